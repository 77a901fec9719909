"""`lattica node`: start a node, ask how it is, name it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lattica.cli.common import (
    DONE,
    DataOption,
    JsonOption,
    UsageError,
    control,
    emit,
    failures,
    lines,
    run,
)
from lattica.errors import ConfigError

if TYPE_CHECKING:
    from lattica.config import Loaded
    from lattica.node import Node

CHANGE_SECONDS: Final = 5.0  # how often the node's addresses are compared: interfaces come and go unannounced

app = typer.Typer(help="Run a node, and ask how it is.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add `lattica node`."""
    root.add_typer(app, name="node")


@app.command()
def start(
    listen: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR", help="Multiaddr to listen on; may be repeated. /tcp/0: a free port."),
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR", help="Peer to stay connected to, .../p2p/ID; may be repeated."),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR", help="Address to announce instead of our own; may be repeated."),
    ] = None,
    data: DataOption = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings file [default: config.toml in the folder].")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve Prometheus metrics here.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="human or json.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings and their sources; start nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a node until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the node listens for it by itself
    with failures(interrupted=DONE):
        loaded = _load(
            data_dir=data,
            config_file=config,
            listen=listen,
            bootstrap=bootstrap,
            announce=announce,
            metrics=metrics,
            log_level=log_level,
            log_format=log_format,
        )
        if print_config:
            emit(_config_json(loaded), json, loaded.to_toml().rstrip())
            return
        import trio

        trio.run(_serve, loaded, json)


def _load(*, config_file: Path | None, **arguments: object) -> Loaded:
    """The settings; a mistake in them is wrong usage."""
    from lattica.config import load

    try:
        return load(arguments, config_file=config_file)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _config_json(loaded: Loaded) -> dict[str, Any]:
    return {
        key: {"value": getattr(loaded.config, key), "source": source}
        for key, source in loaded.sources.items()
    }


async def _serve(loaded: Loaded, as_json: bool) -> None:
    import trio

    from lattica import telemetry
    from lattica.node import open_node

    telemetry.configure(loaded.config.log_level, loaded.config.log_format)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on, signals, nursery.cancel_scope)
            async with open_node(loaded.config) as node:
                ready = {"ready": True, "peer_id": str(node.peer_id), "addresses": node.addresses}
                emit(ready, as_json, _welcome(node))
                async for change in changes(node):
                    emit(change, as_json)


async def _stop_on(signals: AsyncIterator[int], scope: Any) -> None:
    async for _ in signals:
        scope.cancel()
        return


async def changes(node: Node) -> AsyncIterator[dict[str, Any]]:
    """Reachability and addresses, each time that one of them is another than before."""
    import trio

    def state() -> dict[str, Any]:
        return {"reachability": node.reachability, "addresses": node.addresses}

    known = state()
    while True:
        await trio.sleep(CHANGE_SECONDS)
        if (now := state()) != known:
            known = now
            yield now


def _welcome(node: Node) -> str:
    shown = [("peer id", str(node.peer_id)), *(("address", address) for address in node.addresses)]
    return lines([*shown, ("ready", "Ctrl-C stops the node")])


@app.command()
def status(data: DataOption = None, json: JsonOption = False) -> None:
    """How the running node is doing."""
    told = run(_status, data)
    relays = ", ".join(told["relays"]) or "none"
    emit(
        told,
        json,
        lines(
            [
                ("peer id", told["peer_id"]),
                *(("address", address) for address in told["addresses"]),
                ("reachability", told["reachability"]),
                ("mapping", told["mapping"]),
                ("relays", relays),
                ("connections", str(told["connections"])),
                ("uptime", f"{told['uptime_seconds']:.0f} s"),
            ]
        ),
    )


async def _status(data: Path | None) -> Any:
    async with control(data) as node:
        return await node.call("node.status")


@app.command("id")
def identify(data: DataOption = None, json: JsonOption = False) -> None:
    """The peer id of this folder's node, running or not; made with the folder where there is none."""
    from lattica.config import data_dir
    from lattica.folder import load_identity

    with failures():
        peer_id = str(load_identity(data_dir(data)).peer_id)
    emit({"peer_id": peer_id}, json, peer_id)
