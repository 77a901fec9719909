"""The hosts of a MemoryNetwork and the connections between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from lattica.errors import DialError, LocalProtocolError, StreamError, UnreachableError
from lattica.ids import PeerId
from lattica.net.api import Peer, PeerListener, StreamHandler
from lattica.net.identity import Identity
from lattica.protocols import GATED_PREFIX
from lattica.testing.links import Link
from lattica.testing.pipes import MemoryStream, Pipe

if TYPE_CHECKING:
    from lattica.testing.memory import MemoryNetwork

Gate = Callable[[PeerId, str], bool]
_log = logging.getLogger("lattica.testing")


class MemoryConnection:
    """One connection between two hosts: two links, and the streams that run over them."""

    def __init__(
        self, network: MemoryNetwork, dialer: MemoryHost, listener: MemoryHost, out: Link, back: Link
    ) -> None:
        self.peers = (dialer.peer_id, listener.peer_id)
        self.stalled_since: float | None = None
        self.rtt: float | None = None
        self._network = network
        self._hosts = (dialer, listener)
        self._links = (out, back)
        self._streams: dict[MemoryStream, None] = {}
        self._why_lost: str | None = None
        self._changed = trio.lowlevel.ParkingLot()
        for host, other in ((dialer, listener), (listener, dialer)):
            host.attach(other, self)

    @property
    def dialer(self) -> PeerId:
        return self.peers[0]

    def other(self, host: MemoryHost) -> MemoryHost:
        """The host at the other end."""
        return self._hosts[1] if host is self._hosts[0] else self._hosts[0]

    async def cross(self, sender: MemoryHost) -> None:
        """Wait for as long as a few bytes from `sender` take. Raises StreamError if the connection breaks."""
        link = self._from(sender)
        stamp = link.stamp()
        while True:
            if self._why_lost is not None:
                raise StreamError(self._why_lost)
            due = link.due(stamp)
            if due <= trio.current_time():
                return
            with trio.move_on_at(due):
                await self._changed.park()

    def stream(self, opener: MemoryHost, protocol: str) -> tuple[MemoryStream, MemoryStream]:
        """A new stream: its end at `opener`, and its end at the other host."""
        out, back = self._from(opener), self._from(self.other(opener))
        window = self._network.window_bytes
        there, here = Pipe(out, back, window), Pipe(back, out, window)
        near = MemoryStream(self.other(opener).peer_id, protocol, here, there, self._network.spawn_if_open)
        far = MemoryStream(opener.peer_id, protocol, there, here, self._network.spawn_if_open)
        near.twin, far.twin = far, near
        for stream in (near, far):
            self._streams[stream] = None
            stream.on_close = self._forget
        return near, far

    def set(self, *, latency: float | None = None, bandwidth: float | None = None) -> None:
        """Change both directions of the line."""
        for link in self._links:
            link.set(latency=latency, bandwidth=bandwidth)

    def stall(self) -> None:
        self.stalled_since = trio.current_time()
        for link in self._links:
            link.stall()
        self._wake()

    def resume(self) -> None:
        self.stalled_since = None
        for link in self._links:
            link.resume()
        self._wake()

    def lose(self, why: str) -> None:
        """Break the connection: its streams at both ends, once and for all."""
        if self._why_lost is not None:
            return
        self._why_lost = why
        self._network.drop(self)
        for stream in list(self._streams):
            stream.lose(why)
        self._streams.clear()
        self._changed.unpark_all()
        for host in self._hosts:
            host.detach(self.other(host))

    def _forget(self, stream: MemoryStream) -> None:
        self._streams.pop(stream, None)

    def _from(self, sender: MemoryHost) -> Link:
        return self._links[0] if sender is self._hosts[0] else self._links[1]

    def _wake(self) -> None:
        self._changed.unpark_all()
        for stream in self._streams:
            stream.wake()


class MemoryHost:
    """A `lattica.net.api.Host` in a MemoryNetwork. `address` is its multiaddr without /p2p/."""

    def __init__(self, network: MemoryNetwork, identity: Identity, name: str, gate: Gate | None) -> None:
        self.identity = identity
        self.name = name
        self.address = f"/memory/{name}"
        self.is_running = True
        self._network = network
        self._gate = gate
        self._handlers: dict[str, StreamHandler] = {}
        self._running: set[trio.CancelScope] = set()
        self._known: dict[PeerId, dict[str, None]] = {}
        self._connections: dict[PeerId, MemoryConnection] = {}
        self._listeners: dict[object, PeerListener] = {}

    def __repr__(self) -> str:
        return f"MemoryHost({self.name})"

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def addresses(self) -> list[str]:
        return [f"{self.address}/p2p/{self.peer_id}"]

    @property
    def protocols(self) -> tuple[str, ...]:
        """What we serve."""
        return tuple(self._handlers)

    def peers(self) -> list[Peer]:
        return [self._peer(connection) for connection in self._connections.values()]

    async def connect(self, address: str) -> PeerId:
        self._check_running()
        connection = await self._network.dial(self, address)
        peer = connection.other(self).peer_id
        self.add_addresses(peer, [address])
        return peer

    async def disconnect(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        if peer in self._connections:
            self._connections[peer].lose("the connection was closed")

    async def open_stream(self, peer: PeerId, protocols: Sequence[str]) -> MemoryStream:
        connection = await self._reach(peer)
        await connection.cross(self)
        other = connection.other(self)
        protocol = next((name for name in protocols if name in other.protocols), None)
        accepted = None
        if protocol is not None:
            accepted, far = connection.stream(self, protocol)
            other.accept(far)
        try:
            await connection.cross(other)  # the answer of the negotiation
        except BaseException:
            if accepted is not None:
                accepted.reset()
            raise
        if accepted is None:
            raise StreamError(f"{peer} speaks none of {', '.join(protocols)}")
        return accepted

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        if protocol in self._handlers:
            raise LocalProtocolError(f"{protocol} is served already")
        self._handlers[protocol] = handler

    def unserve(self, protocol: str) -> None:
        self._handlers.pop(protocol, None)

    def add_addresses(self, peer: PeerId, addresses: Iterable[str]) -> None:
        self._known.setdefault(peer, {}).update(dict.fromkeys(addresses))

    async def ping(self, peer: PeerId) -> float:
        connection = await self._reach(peer)
        started = trio.current_time()
        await connection.cross(self)
        await connection.cross(connection.other(self))
        connection.rtt = trio.current_time() - started
        return connection.rtt

    def watch(self, listener: PeerListener) -> Callable[[], None]:
        key = object()
        self._listeners[key] = listener

        def end() -> None:
            self._listeners.pop(key, None)

        return end

    def stop(self) -> None:
        """Leave the network: handlers are cancelled, connections break on both sides."""
        self.is_running = False
        self._network.stop(self)
        for connection in list(self._connections.values()):
            connection.lose("the peer has left")
        for scope in self._running:
            scope.cancel()

    def attach(self, other: MemoryHost, connection: MemoryConnection) -> None:
        """A connection to another host is there."""
        self._connections[other.peer_id] = connection
        self.add_addresses(other.peer_id, other.addresses)
        self._tell(other.peer_id, True)

    def detach(self, other: MemoryHost) -> None:
        """The connection to another host is gone."""
        self._connections.pop(other.peer_id, None)
        self._tell(other.peer_id, False)

    def accept(self, stream: MemoryStream) -> None:
        """Hand an inbound stream to its handler, past the gate."""
        gated = self._gate is not None and stream.protocol.startswith(GATED_PREFIX)
        if gated and self._gate is not None and not self._gate(stream.peer, stream.protocol):
            stream.reset()
        else:
            self._network.spawn(self._handle, self._handlers[stream.protocol], stream)

    async def _handle(self, handler: StreamHandler, stream: MemoryStream) -> None:
        scope = trio.CancelScope()
        self._running.add(scope)
        is_done = False
        try:
            with scope:
                await handler(stream)
                is_done = True
        except Exception:
            _log.exception("a handler of %s raised", stream.protocol)
        finally:
            self._running.discard(scope)
            if not is_done:
                stream.reset()
        await stream.aclose()

    async def _reach(self, peer: PeerId) -> MemoryConnection:
        self._check_running()
        if peer in self._connections:
            await trio.lowlevel.checkpoint()
            return self._connections[peer]
        attempts: list[tuple[str, str]] = []
        for address in self._known.get(peer, ()):
            try:
                return await self._network.dial(self, address)
            except DialError as error:
                attempts += error.attempts
        if not attempts:
            raise UnreachableError(f"no address of {peer} is known; connect to it first")
        raise DialError(f"{peer} does not answer", attempts=attempts)

    def _check_running(self) -> None:
        if not self.is_running:
            raise UnreachableError(f"{self.name} has left the network")

    def _peer(self, connection: MemoryConnection) -> Peer:
        other = connection.other(self)
        return Peer(
            other.peer_id,
            rtt=connection.rtt,
            addresses=(other.address,),
            agent=f"memory/{other.name}",
            protocols=other.protocols,
            seen=0.0,
            inbound=connection.dialer != self.peer_id,
        )

    def _tell(self, peer: PeerId, connected: bool) -> None:
        for listener in list(self._listeners.values()):
            listener(peer, connected)
