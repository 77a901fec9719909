"""`lattica peers` and `lattica ping`: who is there, and how far away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lattica import multiaddr
from lattica.cli.common import DataOption, JsonOption, UsageError, control, emit, failures, plain, run
from lattica.ids import PeerId

if TYPE_CHECKING:
    from rich.table import Table


def register(root: typer.Typer) -> None:
    """Add `lattica peers` and `lattica ping`."""
    root.command()(peers)
    root.command()(ping)


def peers(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again each second, until Ctrl-C.")] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Who the node is connected to: path, round trip, program, what they serve."""
    if watch:
        run(_watch, data, json)
    else:
        rows = run(_peers, data)
        emit(rows, json, None if json else _table(rows))


async def _peers(data: Path | None) -> Any:
    async with control(data) as node:
        return await node.call("node.peers")


async def _watch(data: Path | None, as_json: bool) -> None:
    async with control(data) as node, node.stream("node.watch_peers") as tables:
        if as_json:
            async for rows in tables:
                emit(rows)
            return
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            async for rows in tables:
                live.update(_table(rows), refresh=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    # A peer id is what one copies into the next command: it folds rather than lose its end.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("peer", overflow="fold", min_width=26)
    table.add_column("path")
    table.add_column("round trip", justify="right")
    table.add_column("agent")
    table.add_column("serves")
    table.add_column("seen", justify="right")
    for row in rows:
        path = row["path"] if row["via"] is None else f"{row['path']} via {row['via'][-8:]}"
        table.add_row(
            row["peer_id"],
            path,
            "-" if row["rtt_ms"] is None else f"{row['rtt_ms']:.1f} ms",
            plain(row["agent"] or "-"),
            plain(", ".join(f"{name} {what}".strip() for name, what in row["serves"].items()) or "-"),
            f"{row['seen_seconds']:.0f} s",
        )
    return table


def ping(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="A peer id, or an address that ends in one.")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """One round trip from the running node to a peer, dialling it if need be."""
    with failures():
        _check_target(peer)
    told = run(_ping, data, peer)
    emit(told, json, f"{told['peer_id']}: {told['rtt_ms']:.1f} ms")


def _check_target(text: str) -> None:
    """Nothing for a peer id or an address with one; else UsageError."""
    try:
        named = multiaddr.peer_of(text) if text.startswith("/") else PeerId.parse(text)
    except ValueError as error:
        reason = error if text.startswith("/") else f"not a peer id: {text!r}"
        raise UsageError(f"{reason}; `lattica peers` shows the ids of those connected") from None
    if named is None:
        raise UsageError(f"{text} names no peer: it must end in /p2p/ID")


async def _ping(data: Path | None, peer: str) -> Any:
    async with control(data) as node:
        return await node.call("node.ping", peer)
