"""What all commands share: two options, one way to run, one way to print, one way to fail.

Imports nothing of the network, nor trio until a command runs: `lattica --help` loads this.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, TypeVarTuple

import typer

from lattica.errors import LatticaError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from lattica.control import ControlClient

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="The node's folder [env: LATTICA_DATA_DIR; default: ~/.local/share/lattica].",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON value on stdout, for programs.")]

PIPE_COLUMNS = 1000
DONE, FAILED, WRONG_USAGE, NO_NODE, INTERRUPTED = 0, 1, 2, 3, 130


class UsageError(LatticaError):
    """What the user wrote cannot be meant: exit code 2."""

    exit_code = WRONG_USAGE


def run(function: Callable[[*_Args], Awaitable[_T]], *args: *_Args) -> _T:
    """Run an async function under trio and give its result; errors end the command.

    A LatticaError becomes one sentence on stderr and its exit code: 1, or the `exit_code` that its class
    names. Ctrl-C ends with 130, quietly. Anything else is a bug of ours and keeps its traceback.
    """
    import trio

    with failures():
        return trio.run(function, *args)


class failures:
    """Turn what a command raises into one sentence and an exit code: `with failures(): ...`

    `interrupted` is the exit code of Ctrl-C.
    """

    def __init__(self, interrupted: int = INTERRUPTED) -> None:
        self._interrupted = interrupted

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        cause = sole_cause(error)
        if isinstance(cause, KeyboardInterrupt):
            raise typer.Exit(self._interrupted) from None
        if isinstance(cause, BrokenPipeError):
            # The reader of our output has gone (`lattica peers | head`): what is left has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        if isinstance(cause, LatticaError):
            print(f"error: {sentence(cause)}", file=sys.stderr)
            raise typer.Exit(getattr(cause, "exit_code", FAILED)) from None


def sole_cause(error: BaseException | None) -> BaseException | None:
    """The one exception inside groups of one; a group of several interrupts is one, too."""
    while isinstance(error, BaseExceptionGroup):
        _, rest = error.split(KeyboardInterrupt)
        if rest is None:
            return KeyboardInterrupt()
        if len(rest.exceptions) != 1:
            return rest
        error = rest.exceptions[0]
    return error


def sentence(error: LatticaError) -> str:
    """The error's words on one line; of an error inside the node, the words that it had there."""
    text = getattr(error, "text", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def emit(value: object, as_json: bool = True, text: RenderableType | None = None) -> None:
    """Print one result: `value` as one line of JSON, or for people `text` (a string or a rich renderable).

    Flushed at once, so that a program can wait for the line. Without `text` people get the JSON, too.
    """
    if as_json or text is None:
        print(json.dumps(value, ensure_ascii=False), flush=True)
    elif isinstance(text, str):
        print(text, flush=True)
    else:
        from rich.console import Console

        # A table that goes to a file or a pipe is read by grep: its cells stay on one line.
        Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(text)


def lines(pairs: list[tuple[str, str]]) -> str:
    """`name: value` lines, values in one column."""
    width = max(len(name) for name, _ in pairs) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in pairs)


def plain(text: str) -> Text:
    """A stranger's words for a table: no markup is read in them, no control character gets through."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


@asynccontextmanager
async def control(data: Path | None) -> AsyncIterator[ControlClient]:
    """The running node of this folder, by its control socket. NodeNotRunningError (exit code 3) if none."""
    from lattica.config import data_dir
    from lattica.control import open_client

    async with open_client(data_dir(data)) as client:
        yield client
