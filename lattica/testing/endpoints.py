"""An Rpc on a host, wired as a node wires it."""

from __future__ import annotations

from lattica import protocols
from lattica.ids import PeerId
from lattica.net.api import Host, Stream
from lattica.rpc.service import Limits, Rpc


def endpoint(host: Host, protocol: str = protocols.RPC, *, limits: Limits | None = None) -> Rpc:
    """Serve calls under a protocol id on a host, and make them; for tests that need no whole node."""

    async def open_stream(peer: PeerId) -> Stream:
        return await host.open_stream(peer, [protocol])

    def on_peer(peer: PeerId, connected: bool) -> None:
        if not connected:
            rpc.forget(peer)

    rpc = Rpc(local=host.peer_id, open_stream=open_stream, limits=limits)
    host.serve(protocol, rpc.handle)
    host.watch(on_peer)
    return rpc
