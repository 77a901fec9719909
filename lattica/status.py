"""What a node tells about itself and its peers, and in which shapes: the control methods of `node`.

The JSON shapes are a contract with programs that read `lattica ... --json` (docs/node.md).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import trio

from lattica import protocols
from lattica.errors import LatticaError
from lattica.ids import PeerId
from lattica.net.api import Peer
from lattica.rpc.service import Call, Service

if TYPE_CHECKING:
    from lattica.node import Node

ASK_SECONDS: Final = 1.0  # for what a peer serves; a row without it is better than a slow table
WATCH_SECONDS: Final = 1.0  # between two tables of `lattica peers --watch`
MAX_SERVES: Final = 32  # entries that we believe a peer about what it serves
MAX_SERVES_CHARACTERS: Final = 200  # of each; a table's cell


def describe(node: Node) -> dict[str, Any]:
    """`lattica node status --json`."""
    return {
        "peer_id": str(node.peer_id),
        "addresses": node.addresses,
        "reachability": node.reachability,
        "mapping": node.mapping,
        "relays": [],  # this version uses none
        "connections": len(node.peers()),
        "uptime_seconds": round(node.uptime_seconds, 3),
    }


def peer_row(peer: Peer, serves: Mapping[str, str]) -> dict[str, Any]:
    """One entry of `lattica peers --json`."""
    return {
        "peer_id": str(peer.peer_id),
        "path": peer.path,
        "via": None if peer.via is None else str(peer.via),
        "rtt_ms": None if peer.rtt is None else round(peer.rtt * 1000, 3),
        "addresses": list(peer.addresses),
        "agent": peer.agent,
        "serves": dict(serves),
        "seen_seconds": round(peer.seen, 3),
    }


async def peer_rows(node: Node) -> list[dict[str, Any]]:
    """All entries of `lattica peers --json`, by peer id; each peer is asked now what it serves."""
    peers = sorted(node.peers(), key=lambda peer: peer.peer_id)
    serves: dict[PeerId, dict[str, str]] = {}

    async def ask(peer: PeerId) -> None:
        try:
            serves[peer] = _served(await node.rpc.call(peer, "lattica.serves", timeout=ASK_SECONDS))
        except LatticaError as error:
            node.log.debug("a peer did not say what it serves", peer=peer, why=error)

    async with trio.open_nursery() as nursery:
        for peer in peers:
            if protocols.RPC in peer.protocols:
                nursery.start_soon(ask, peer.peer_id)
    return [peer_row(peer, serves.get(peer.peer_id, {})) for peer in peers]


def _served(reply: object) -> dict[str, str]:
    """What a peer claims to serve, cut down to what a table can show."""
    if not isinstance(reply, dict):
        return {}
    claims = [(key, value) for key, value in reply.items() if isinstance(value, str)]
    return {key[:MAX_SERVES_CHARACTERS]: value[:MAX_SERVES_CHARACTERS] for key, value in claims[:MAX_SERVES]}


def control_service(node: Node) -> Service:
    """What commands may ask: `node.status`, `node.peers`, `node.watch_peers`, `node.ping`."""
    service = Service("node")

    @service.method
    async def status(call: Call) -> dict[str, Any]:
        return describe(node)

    @service.method
    async def peers(call: Call) -> list[dict[str, Any]]:
        return await peer_rows(node)

    @service.method
    async def ping(call: Call, target: str) -> dict[str, Any]:
        """`target`: a peer id, or an address that ends in one. Gives `{"peer_id", "rtt_ms"}`."""
        peer = await node.connect(target) if target.startswith("/") else PeerId.parse(target)
        seconds = await node.host.ping(peer)
        return {"peer_id": str(peer), "rtt_ms": round(seconds * 1000, 3)}

    @service.method
    async def watch_peers(call: Call) -> AsyncIterator[list[dict[str, Any]]]:
        while True:
            yield await peer_rows(node)
            await trio.sleep(WATCH_SECONDS)

    return service


def public_service(node: Node) -> Service:
    """What any peer may ask on `/lattica/rpc`: `lattica.serves`."""
    service = Service("lattica")

    @service.method
    async def serves(call: Call) -> dict[str, str]:
        return node.serves

    return service
