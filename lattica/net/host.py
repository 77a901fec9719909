"""A libp2p peer as a `lattica.net.api.Host`: starts it, stops it, and keeps what it learns of its peers.

Connections and streams are ours; of libp2p we use what goes over the wire (identify's and
Noise's messages, kinds of keys). Its Swarm and BasicHost cost about 1 ms an inbound stream and two tasks a connection,
and what they do beyond that is what `compat` would have to take away again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import trio
from multiaddr import Multiaddr

from lattica.errors import (
    DialError,
    StreamError,
    UnreachableError,
    single_error,
)
from lattica.ids import PeerId
from lattica.net import compat, identify
from lattica.net.addresses import dialable, expanded, parsed, target
from lattica.net.api import Peer, PeerListener, StreamHandler
from lattica.net.attend import Attendant
from lattica.net.connection import MuxedConnection, Traffic
from lattica.net.dial import SharedDial, first_of
from lattica.net.handlers import Gate, Handlers
from lattica.net.identity import Identity
from lattica.net.mux import WindowBudget
from lattica.net.peers import PeerTable
from lattica.net.stream import MuxedStream
from lattica.net.traffic import count
from lattica.net.transport import Transport
from lattica.protocols import (
    HANDSHAKE_TIMEOUT_SECONDS,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    MAX_WINDOW_GROWTH_BYTES,
)
from lattica.telemetry import Metrics

log = logging.getLogger("lattica.net")

AGENT = "lattica/0.1.0"
CHECK_SECONDS = 1.0  # between two looks at all connections: far below the limits of their pings
CLOSE_SECONDS = 2.0  # for the last frames of all connections together, when the host stops


@asynccontextmanager
async def open_host(
    *,
    identity: Identity,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    agent: str = AGENT,
    gate: Gate | None = None,
    max_connections: int = MAX_CONNECTIONS,
    max_connections_per_peer: int = MAX_CONNECTIONS_PER_PEER,
    max_window_growth_bytes: int = MAX_WINDOW_GROWTH_BYTES,
    metrics: Metrics | None = None,
) -> AsyncIterator[MeshHost]:
    """Run a host for as long as the block runs.

    Args:
        listen: multiaddrs such as /ip4/0.0.0.0/tcp/4001; port 0 takes a free one. Empty: only dials.
        announce: what peers are told instead of the addresses that we listen on.
        agent: what peers are told that we run.
        gate: who may use protocols under /lattica/; see `Handlers`. None lets everybody in.
        max_connections, max_connections_per_peer: new ones beyond are closed, old ones stay.
        max_window_growth_bytes: what the receive windows of all connections together may grow by.
        metrics: where bytes, streams and connections are counted.

    Raises:
        ConfigError: an address is malformed, in use, or not this machine's.
    """
    compat.require_version()
    compat.quiet_loggers()
    traffic = Traffic()
    transport = Transport(identity, windows=WindowBudget(max_window_growth_bytes), traffic=traffic)
    with single_error():
        try:
            announced = [str(parsed(address)) for address in announce]
            for address in [parsed(address) for address in listen]:
                transport.bind(address)
            async with trio.open_nursery() as nursery:
                host = MeshHost(
                    identity.peer_id,
                    transport,
                    nursery,
                    announce=announced,
                    agent=agent,
                    gate=gate,
                    max_connections=max_connections,
                    max_connections_per_peer=max_connections_per_peer,
                    traffic=traffic,
                )
                nursery.start_soon(transport.serve, host.joined)
                nursery.start_soon(host.keep)
                with count(metrics, traffic, lambda: len(host.connections())):
                    try:
                        yield host
                    finally:
                        transport.close()
                        with trio.CancelScope(shield=True):
                            await host.close()
                        nursery.cancel_scope.cancel()
        finally:
            transport.close()


class MeshHost:
    """Implements `lattica.net.api.Host`. Made by `open_host`."""

    def __init__(
        self,
        peer_id: PeerId,
        transport: Transport,
        nursery: trio.Nursery,
        *,
        announce: Sequence[str],
        agent: str,
        gate: Gate | None,
        max_connections: int,
        max_connections_per_peer: int,
        traffic: Traffic,
    ) -> None:
        self.traffic = traffic
        self._peer_id = peer_id
        self._transport = transport
        self._nursery = nursery
        self._announce = announce
        self._bound = transport.bound
        self._max_connections = max_connections
        self._max_connections_per_peer = max_connections_per_peer
        self._table = PeerTable()
        self._connections: dict[PeerId, list[MuxedConnection]] = {}
        self._count = 0
        self._dials: dict[PeerId, SharedDial[MuxedConnection]] = {}
        self._handlers = Handlers(gate)
        self._listeners: list[PeerListener] = []
        self._closing = False
        self._attendant = Attendant(self, nursery, agent=agent)

    # Who we are

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> list[str]:
        """Dialable multiaddrs of ours, with /p2p/, no wildcards."""
        return [f"{address}/p2p/{self._peer_id}" for address in self.advertised]

    @property
    def advertised(self) -> list[str]:
        """The same without /p2p/: what identify tells."""
        if self._announce:
            return [address.removesuffix(f"/p2p/{self._peer_id}") for address in self._announce]
        return list(dict.fromkeys(address for bound in self._bound for address in expanded(bound)))

    @property
    def protocols(self) -> list[str]:
        """Every protocol that we serve, libp2p's among them."""
        return self._handlers.protocols

    @property
    def transport(self) -> Transport:
        """What dials and listens for this host."""
        return self._transport

    # Peers

    @property
    def table(self) -> PeerTable:
        """What we know of peers."""
        return self._table

    def peers(self) -> list[Peer]:
        for connection in self.connections():
            self._table.heard(connection.peer, at=connection.heard)
        return self._table.peers(now=trio.current_time())

    def add_addresses(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Remember where a peer may be dialled; addresses that are none are left out."""
        usable = [text for address in addresses if (text := dialable(address, peer)) is not None]
        if usable and peer != self._peer_id:
            self._table.learn(peer, usable)

    def watch(self, listener: PeerListener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def connections(self, peer: PeerId | None = None) -> list[MuxedConnection]:
        """The live connections to a peer, oldest first; to all peers without one."""
        if peer is not None:
            return list(self._connections.get(peer, ()))
        return [connection for several in self._connections.values() for connection in several]

    # Connecting

    async def connect(self, address: str) -> PeerId:
        peer, where = target(address)
        if peer == self._peer_id:
            raise DialError(f"{address} is this node's own address")
        if not self._usable(peer):
            self._table.learn(peer, [where])
            await self._dial(peer)
        await trio.lowlevel.checkpoint()
        return peer

    async def disconnect(self, peer: PeerId) -> None:
        async with trio.open_nursery() as nursery:
            for connection in self.connections(peer):
                nursery.start_soon(connection.close)

    async def _connection(self, peer: PeerId) -> MuxedConnection:
        connection = self._usable(peer)
        if connection is not None:
            return connection
        if not self._table.addresses(peer):
            raise UnreachableError(f"no address of {peer} is known; connect to it by address first")
        return await self._dial(peer)

    async def _dial(self, peer: PeerId) -> MuxedConnection:
        dial = self._dials.get(peer)
        if dial is None:
            dial = self._dials[peer] = SharedDial()
            self._nursery.start_soon(self._run_dial, peer, dial)
        return await dial.wait()

    async def _run_dial(self, peer: PeerId, dial: SharedDial[MuxedConnection]) -> None:
        async def connect_first() -> MuxedConnection:
            found = await first_of(self._table.addresses(peer), attempt, what=str(peer))
            return found[1]

        async def attempt(address: str) -> MuxedConnection:
            connection = await self._transport.connect(Multiaddr(f"{address}/p2p/{peer}"))
            self.joined(connection)
            if connection.is_closed:
                raise DialError(connection.reason)
            return connection

        try:
            await dial.run(connect_first)
        finally:
            del self._dials[peer]

    def _usable(self, peer: PeerId) -> MuxedConnection | None:
        """The newest connection that takes streams."""
        for connection in reversed(self._connections.get(peer, ())):
            if connection.can_open:
                return connection
        return None

    def joined(self, connection: MuxedConnection) -> None:
        """Take a connection that has proved who it is and run it, or close it when there are too many."""
        peer = connection.peer
        several = self._connections.get(peer, [])
        if self._closing:
            connection.abort("this node stops")
        elif self._count >= self._max_connections:
            connection.abort(f"more than {self._max_connections} connections")
        elif len(several) >= self._max_connections_per_peer:
            connection.abort(f"more than {self._max_connections_per_peer} connections to one peer")
        if connection.is_closed:
            log.info("closed a new connection of %s: %s", peer, connection.reason)
            return
        several.append(connection)
        self._connections[peer] = several
        self._count += 1
        if len(several) == 1:
            self._table.connected(
                peer,
                address=str(connection.remote),
                inbound=not connection.is_initiator,
                now=trio.current_time(),
            )
            log.info("connected to %s at %s", peer, connection.remote)
            self._tell(peer, True)
        connection.spoken = self._table.spoken(peer)
        connection.watch(self._left)
        self._nursery.start_soon(connection.run, self)
        self._nursery.start_soon(self._attendant.ask, connection)

    def _left(self, connection: MuxedConnection) -> None:
        peer = connection.peer
        several = self._connections[peer]
        several.remove(connection)
        self._count -= 1
        if not several:
            del self._connections[peer]
            self._table.disconnected(peer, now=trio.current_time())
            log.info("disconnected from %s: %s", peer, connection.reason)
            self._tell(peer, False)

    def _tell(self, peer: PeerId, connected: bool) -> None:
        for listener in list(self._listeners):
            try:
                listener(peer, connected)
            except Exception:
                log.exception("a listener of connections failed")

    def identified(self, peer: PeerId, description: identify.Description) -> None:
        """A peer said what it is."""
        if self._table.is_connected(peer):
            self._table.identified(
                peer,
                agent=description.agent,
                protocols=description.protocols,
                addresses=description.addresses,
                now=trio.current_time(),
            )
            for connection in self.connections(peer):
                connection.spoken = self._table.spoken(peer)

    async def keep(self) -> None:
        """Look after all connections: one timer for all of them."""
        while True:
            due = trio.current_time() + CHECK_SECONDS
            await trio.sleep_until(due)
            now = trio.current_time()
            if now - due > CHECK_SECONDS:
                continue  # this process stood still: what came meanwhile must be read before anybody is called mute
            for connection in self.connections():
                connection.check(now)

    def ponged(self, connection: MuxedConnection, rtt: float) -> None:
        """A connection's own ping came back."""
        self._table.pinged(connection.peer, rtt, now=trio.current_time())

    # Streams

    async def open_stream(self, peer: PeerId, protocols: Sequence[str]) -> MuxedStream:
        fresh = self._usable(peer) is None
        connection = await self._connection(peer)
        try:
            return await self._open(connection, protocols)
        except StreamError:
            if fresh or not connection.is_closed or not self._table.addresses(peer):
                raise
        return await self._open(await self._dial(peer), protocols)  # the old connection was dead already

    async def _open(self, connection: MuxedConnection, protocols: Sequence[str]) -> MuxedStream:
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS):
                stream = await connection.open(protocols)
        except trio.TooSlowError as error:
            raise StreamError(
                f"{connection.peer} did not agree on a protocol within {HANDSHAKE_TIMEOUT_SECONDS:g} seconds"
            ) from error
        if stream is None:
            raise StreamError(f"{connection.peer} does not speak {' or '.join(protocols)}")
        return stream

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers.add(protocol, handler)
        if self._connections:
            self._attendant.changed()

    def unserve(self, protocol: str) -> None:
        self._handlers.remove(protocol)
        self._attendant.changed()

    def stream_opened(self, stream: MuxedStream) -> None:
        """A peer opened a stream: handle it in a task of its own."""
        self._nursery.start_soon(self._handlers.handle, stream)

    async def ping(self, peer: PeerId) -> float:
        rtt = await self._attendant.ping(await self._connection(peer))
        if rtt is None:
            raise StreamError(f"{peer} does not speak ping")
        return rtt

    async def close(self) -> None:
        """Close all connections; called by `open_host`."""
        self._closing = True
        with trio.move_on_after(CLOSE_SECONDS):
            async with trio.open_nursery() as nursery:
                for connection in self.connections():
                    nursery.start_soon(connection.close)
        for connection in self.connections():
            connection.abort("this node stopped")
