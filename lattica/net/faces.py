"""Our transport, connections and streams as libp2p's own code takes them: an ITransport that hands out IMuxedConn.

For libp2p's protocol code where a node runs some; `host` needs none of it. libp2p's Swarm then skips its own TCP,
Noise and Yamux, and its exceptions stay inside this module.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IListener, IMuxedConn, IMuxedStream, IRawConnection, ITransport
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import THandler
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from lattica.errors import DialError, LocalProtocolError, StreamError
from lattica.net import yamux
from lattica.net.connection import MuxedConnection
from lattica.net.noise import PROTOCOL as NOISE
from lattica.net.stream import MuxedStream
from lattica.net.transport import Transport


class TransportFace(ITransport):
    """Dials and listens by our transport."""

    provides_native_muxing = True  # Swarm asks: connections come secured and multiplexed

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """A connection to an address that ends in /p2p/ID. Raises OpenConnectionError."""
        try:
            connection: Any = ConnectionFace(await self.transport.connect(maddr))
        except DialError as error:
            raise OpenConnectionError(str(error)) from error
        return connection  # type: ignore[no-any-return]  # libp2p takes an IMuxedConn here and says so nowhere

    def create_listener(self, handler_function: THandler) -> IListener:
        return ListenerFace(self.transport, handler_function)

    def can_dial(self, maddr: Multiaddr) -> bool:
        names = [protocol.name for protocol in maddr.protocols()]
        return names[1:2] == ["tcp"] and names[2:] in ([], ["p2p"])

    def can_listen(self, maddr: Multiaddr) -> bool:
        return self.can_dial(maddr)

    def protocols(self) -> list[str]:
        return ["tcp"]


class ListenerFace(IListener):
    """Accepts on the addresses that it is told, and gives each proven connection to libp2p's handler."""

    background_nursery: trio.Nursery  # Swarm sets it before it calls `listen`

    def __init__(self, transport: Transport, handler: THandler) -> None:
        self._transport = transport
        self._handler: Callable[[Any], Awaitable[None]] = handler
        self._scope = trio.CancelScope()

    async def listen(self, maddr: Multiaddr) -> None:
        self._transport.bind(maddr)
        self.background_nursery.start_soon(self._serve)
        await trio.lowlevel.checkpoint()

    async def _serve(self) -> None:
        with self._scope:
            await self._transport.serve(self._joined)

    def _joined(self, connection: MuxedConnection) -> None:
        self.background_nursery.start_soon(self._hand_over, connection)

    async def _hand_over(self, connection: MuxedConnection) -> None:
        """Stay until the connection ends: libp2p frees its slot with this task (swarm.py:1982 never does)."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handler, ConnectionFace(connection))
                await connection.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            connection.abort("this node stopped")

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(self._transport.bound)

    async def close(self) -> None:
        self._scope.cancel()
        self._transport.close()
        await trio.lowlevel.checkpoint()


class ConnectionFace(IMuxedConn):
    """One connection. libp2p starts it and accepts its streams."""

    def __init__(self, connection: MuxedConnection) -> None:
        self.connection = connection
        self.peer_id = ID(connection.peer.multihash)
        self.event_started = trio.Event()
        self.negotiated_security_protocol = NOISE
        self.negotiated_muxer_protocol = yamux.PROTOCOL
        self._send_opened, self._opened = trio.open_memory_channel[MuxedStream](yamux.MAX_INBOUND_STREAMS)

    async def start(self) -> None:
        """Run the connection until it ends."""
        self.event_started.set()
        try:
            await self.connection.run(self)
        finally:
            self._send_opened.close()

    def stream_opened(self, stream: MuxedStream) -> None:
        """As `connection.Owner` has it."""
        try:
            self._send_opened.send_nowait(stream)
        except trio.WouldBlock:
            stream.reset()

    def ponged(self, connection: MuxedConnection, rtt: float) -> None:
        """As `connection.Owner` has it."""

    async def open_stream(self) -> IMuxedStream:
        """A new stream, under no protocol yet. Raises MuxedConnUnavailable."""
        await trio.lowlevel.checkpoint()
        try:
            return StreamFace(self, self.connection.open_now())
        except StreamError as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> IMuxedStream:
        """The next stream that the other side opens. Raises MuxedConnUnavailable at the end."""
        try:
            return StreamFace(self, await self._opened.receive())
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise MuxedConnUnavailable(self.connection.reason or "closed") from error

    async def close(self) -> None:
        await self.connection.close()

    @property
    def is_closed(self) -> bool:
        return self.connection.is_closed

    @property
    def is_initiator(self) -> bool:
        return self.connection.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_closed

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [self.connection.remote]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT

    def get_remote_address(self) -> tuple[str, int] | None:
        remote = self.connection.remote
        protocol = "ip6" if remote.protocols()[0].name == "ip6" else "ip4"
        host, port = remote.value_for_protocol(protocol), remote.value_for_protocol("tcp")
        return (str(host), int(port)) if host and port else None


class StreamFace(IMuxedStream):
    """One stream."""

    muxed_conn: ConnectionFace

    def __init__(self, connection: ConnectionFace, stream: MuxedStream) -> None:
        self.muxed_conn = connection
        self.stream = stream

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes. Raises MuxedStreamEOF after the other side's end, MuxedStreamReset."""
        if n == 0:
            return b""
        try:
            data = await self.stream.receive_some(None if n is None or n < 0 else n)
        except StreamError as error:
            raise MuxedStreamReset(str(error)) from error
        if not data:
            raise MuxedStreamEOF("the other side ended the stream")
        return data

    async def write(self, data: bytes) -> None:
        """Send everything. Raises MuxedStreamReset, MuxedStreamClosed."""
        try:
            await self.stream.send_all(data)
        except StreamError as error:
            raise MuxedStreamReset(str(error)) from error
        except LocalProtocolError as error:
            raise MuxedStreamClosed(str(error)) from error

    async def close_write(self) -> None:
        """End our direction."""
        if self.stream.is_open:
            await self.stream.send_eof()

    async def close(self) -> None:
        """End our direction only: libp2p's code closes before it has read what it waits for."""
        await self.close_write()

    async def reset(self) -> None:
        """Break the stream off; of a lost connection what arrived can still be read (libp2p resets all then)."""
        if not self.muxed_conn.is_closed:
            self.stream.reset()
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        """Not supported: trio's cancel scopes do this."""
        raise NotImplementedError("use a trio cancel scope")

    async def __aenter__(self) -> StreamFace:
        return self

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()
