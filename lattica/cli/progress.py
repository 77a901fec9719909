"""A progress bar of bytes on stderr, for commands that fetch or convert."""

from __future__ import annotations


class ByteProgress:
    """Shows `update(done_bytes, total_bytes)` while its block runs; quiet where stderr is no terminal."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> ByteProgress:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Say how far it is."""
        self._progress.update(self._task, completed=done_bytes, total=total_bytes)
