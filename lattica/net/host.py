"""A libp2p host as a `lattica.net.api.Host`: starts it, stops it, and keeps what it learns of its peers.

libp2p gives the protocols (multistream names, identify, ping, peer ids, multiaddrs, its table of handlers);
connections and streams are our transport's. mDNS, UPnP, AutoNAT, bootstrap and the auto-connector are off.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from lattica.errors import (
    DialError,
    LocalProtocolError,
    StreamError,
    UnreachableError,
    single_error,
)
from lattica.ids import PeerId
from lattica.net import compat
from lattica.net.addresses import dialable, expanded, parsed, target
from lattica.net.api import Peer, PeerListener, StreamHandler
from lattica.net.attend import Attendant
from lattica.net.connection import MuxedConnection
from lattica.net.dial import SharedDial, first_of
from lattica.net.identity import Identity
from lattica.net.peers import PeerTable
from lattica.net.stream import ForLibp2p, MuxedStream
from lattica.net.transport import Transport
from lattica.protocols import GATED_PREFIX, HANDSHAKE_TIMEOUT_SECONDS

log = logging.getLogger("lattica.net")

AGENT = "lattica/0.1.0"
MAX_CONNECTIONS = 512  # a socket, two tasks and some buffers each
MAX_CONNECTIONS_PER_PEER = 8  # two from dialling each other at once, some on their way out
CLOSE_SECONDS = 2.0  # for the last frames of all connections together, when the host stops

Gate = Callable[[PeerId, str], bool]


@asynccontextmanager
async def open_host(
    *,
    identity: Identity,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    agent: str = AGENT,
    gate: Gate | None = None,
    max_connections: int = MAX_CONNECTIONS,
) -> AsyncIterator[Libp2pHost]:
    """Run a host for as long as the block runs.

    Args:
        listen: multiaddrs such as /ip4/0.0.0.0/tcp/4001; port 0 takes a free one. Empty: only dials.
        announce: what peers are told instead of the addresses that we listen on.
        agent: what peers are told that we run.
        gate: asked with (peer, protocol) before a handler sees an inbound stream under /lattica/; False
        resets
            the stream. None lets everybody in. Must not wait.

    Raises:
        ConfigError: an address is malformed, in use, or not this machine's.
    """
    compat.require_version()
    compat.quiet_loggers()
    announced = [str(parsed(address)) for address in announce]
    transport = Transport(identity)
    with single_error():
        try:
            addresses = [parsed(address) for address in listen]
            for address in addresses:
                await transport.bind(address)
            network = _network(identity, transport, max_connections)
            async with background_trio_service(network):
                if addresses:
                    await network.listen(*addresses)
                async with trio.open_nursery() as nursery:
                    host = Libp2pHost(
                        identity.peer_id,
                        network,
                        transport,
                        nursery,
                        announce=announced,
                        agent=agent,
                        gate=gate,
                    )
                    try:
                        yield host
                    finally:
                        with trio.CancelScope(shield=True):
                            await host._close()
                        nursery.cancel_scope.cancel()
        finally:
            transport.close_bound()


def _network(identity: Identity, transport: Transport, max_connections: int) -> Swarm:
    keys = create_new_key_pair(identity.private_bytes)
    own = ID(identity.peer_id.multihash)
    store = PeerStore()
    store.add_key_pair(own, keys)
    network = Swarm(
        own,
        store,
        TransportUpgrader({}, {}),  # nothing to upgrade: our transport hands out finished connections
        transports=[transport],
        connection_config=compat.connection_config(max_connections),
    )
    compat.no_auto_connector(network)
    return network


class Libp2pHost:
    """Implements `lattica.net.api.Host`. Made by `open_host`."""

    def __init__(
        self,
        peer_id: PeerId,
        network: Swarm,
        transport: Transport,
        nursery: trio.Nursery,
        *,
        announce: Sequence[str],
        agent: str,
        gate: Gate | None,
    ) -> None:
        self._peer_id = peer_id
        self._network = network
        self._transport = transport
        self._nursery = nursery
        self._announce = announce
        self._gate = gate
        self._table = PeerTable()
        self._connections: dict[PeerId, list[MuxedConnection]] = {}
        self._dials: dict[PeerId, SharedDial[MuxedConnection]] = {}
        self._listeners: list[PeerListener] = []
        self._libp2p = BasicHost(network)
        for protocol in list(self._libp2p.get_mux().get_protocols()):  # ping and identify: ours instead
            self._libp2p.remove_stream_handler(TProtocol(str(protocol)))
        compat.stop_own_identify(self._libp2p)
        compat.guard_streams(self._libp2p, self._may_pass)
        self._attendant = Attendant(self, nursery, agent=agent)
        network.register_notifee(_Joined(self._joined))

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
        listeners = self._network.listeners.values()
        return list(
            dict.fromkeys(a for one in listeners for bound in one.get_addrs() for a in expanded(bound))
        )

    @property
    def protocols(self) -> list[str]:
        """Every protocol that we serve, libp2p's among them."""
        return [str(protocol) for protocol in self._libp2p.get_mux().get_protocols() if protocol]

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
            try:
                await self._network.add_conn(connection, direction="outbound")
            except BaseException:
                connection.abort("not registered")
                raise
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

    def _joined(self, connection: MuxedConnection) -> None:
        peer = connection.peer
        several = self._connections.setdefault(peer, [])
        if len(several) >= MAX_CONNECTIONS_PER_PEER:
            connection.abort(f"more than {MAX_CONNECTIONS_PER_PEER} connections to one peer")
            return
        several.append(connection)
        now = trio.current_time()
        if len(several) == 1:
            self._table.connected(
                peer, address=str(connection.remote), inbound=not connection.is_initiator, now=now
            )
            log.info("connected to %s at %s", peer, connection.remote)
            self._tell(peer, True)
        connection.watch(self._left)
        self._nursery.start_soon(self._attendant.attend, connection)

    def _left(self, connection: MuxedConnection) -> None:
        peer = connection.peer
        several = self._connections[peer]
        several.remove(connection)
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
        if protocol in self.protocols:
            raise LocalProtocolError(f"{protocol} is served already")

        async def for_libp2p(net_stream: INetStream) -> None:
            muxed = net_stream.muxed_stream  # type: ignore[attr-defined]  # NetStream has it
            assert isinstance(muxed, ForLibp2p)
            await handler(muxed.stream)

        self._libp2p.set_stream_handler(TProtocol(protocol), for_libp2p)
        if self._connections:
            self._attendant.changed()

    def unserve(self, protocol: str) -> None:
        self._libp2p.remove_stream_handler(TProtocol(protocol))
        self._attendant.changed()

    def _may_pass(self, peer: PeerId, protocol: str) -> bool:
        return self._gate is None or not protocol.startswith(GATED_PREFIX) or self._gate(peer, protocol)

    async def ping(self, peer: PeerId) -> float:
        rtt = await self._attendant.ping(await self._connection(peer))
        if rtt is None:
            raise StreamError(f"{peer} does not speak ping")
        return rtt

    async def _close(self) -> None:
        with trio.move_on_after(CLOSE_SECONDS):
            async with trio.open_nursery() as nursery:
                for connection in self.connections():
                    nursery.start_soon(connection.close)
        for connection in self.connections():
            connection.abort("this node stopped")
        await self._libp2p.close()


class _Joined(INotifee):
    """Tells of each connection that libp2p has registered."""

    def __init__(self, joined: Callable[[MuxedConnection], None]) -> None:
        self._joined = joined

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        assert isinstance(conn.muxed_conn, MuxedConnection), "only our transport is registered"
        self._joined(conn.muxed_conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """The connection itself tells, 100 ms earlier (swarm_connection.py:201)."""

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...
