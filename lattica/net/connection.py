"""One connection and its streams: Noise and Yamux driven over a trio stream by one reader and one writer
task.

Nobody but the writer touches the socket. Whoever sends hands over whole frames and may be cancelled at any
point; the connection never sees half a frame. The writer takes everything that waits, seals it in one go and
sends it in one call. A connection that is lost breaks its streams with StreamError, never with a clean end.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import trio
from libp2p.abc import IMuxedConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from lattica.errors import RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net import multistream, yamux
from lattica.net.noise import PROTOCOL as NOISE
from lattica.net.noise import NoiseSession
from lattica.net.stream import ForLibp2p, MuxedStream

log = logging.getLogger("lattica.net.connection")

READ_BYTES = 256 * 1024  # one read takes what a socket buffer holds
HIGH_WATER_BYTES = 256 * 1024  # senders wait while more is queued: bounds memory and the wait of small frames
CLOSE_SECONDS = 1.0  # for the last frames to leave when a connection is closed
ACCEPT_BACKLOG = yamux.MAX_INBOUND_STREAMS  # the state machine refuses streams beyond it


class MuxedConnection(IMuxedConn):
    """One secured connection. `start` runs it until it ends; nothing happens before.

    Args:
        stream: the bytes below Noise; owned and closed by the connection.
        session: the Noise session; bytes it already holds are delivered first.
        early: plaintext that already followed the choice of the muxer.
        remote: the other end's transport address, without /p2p/.
    """

    def __init__(
        self,
        stream: trio.SocketStream,
        session: NoiseSession,
        *,
        peer: PeerId,
        initiator: bool,
        early: bytes = b"",
        remote: Multiaddr,
    ) -> None:
        self.peer = peer
        self.peer_id = ID(peer.multihash)
        self.remote = remote
        self.event_started = trio.Event()
        self.negotiated_security_protocol = NOISE
        self.negotiated_muxer_protocol = yamux.PROTOCOL
        self.ended = trio.Event()
        self.reason = ""  # why it ended, for people
        self.heard = trio.current_time()  # when bytes last came
        self._stream = stream
        self._session = session
        self._early = early
        self._initiator = initiator
        self._mux = yamux.Yamux(initiator=initiator)
        self._streams: dict[int, MuxedStream] = {}
        self._send_accepted, self._accepted = trio.open_memory_channel[MuxedStream](ACCEPT_BACKLOG)
        self._pending = trio.lowlevel.ParkingLot()  # the writer, while nothing waits to be sent
        self._drain = trio.lowlevel.ParkingLot()  # senders, while too much waits
        self._writing = False
        self._closing = False
        self._watchers: list[Callable[[MuxedConnection], None]] = []

    # Running

    async def start(self) -> None:
        """Read and write until the connection ends. Raises nothing but Cancelled."""
        self.event_started.set()
        try:
            if not self.is_closed:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read()
                    nursery.cancel_scope.cancel()
        except Exception:  # a bug of ours: it costs this connection, and libp2p would end the host for it
            log.exception("the connection to %s failed", self.peer)
        finally:
            self.abort("this node stopped")

    async def _read(self) -> None:
        try:
            self._handle(self._early)
            for plain in self._session.receive(b""):
                self._handle(plain)
            while not self.is_closed:
                data = await self._stream.receive_some(READ_BYTES)
                self.heard = trio.current_time()
                if not data:
                    self.abort("the other side closed the connection")
                    return
                for plain in self._session.receive(data):
                    self._handle(plain)
                self._wake_writer()
        except RemoteProtocolError as error:
            log.info("closing the connection to %s: %s", self.peer, error)
            self.abort(str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.abort(f"the connection was lost ({error.__cause__ or error})")

    async def _write(self) -> None:
        try:
            while not self.is_closed:
                if not self._mux.output_bytes:
                    self._writing = False
                    self._drain.unpark_all()
                    await self._pending.park()
                    continue
                self._writing = True
                sealed = self._session.encrypt(self._mux.take_output())
                self._drain.unpark_all()
                await self._stream.send_all(sealed)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.abort(f"the connection was lost ({error.__cause__ or error})")

    def _handle(self, plain: bytes) -> None:
        for event in self._mux.receive(plain):
            if isinstance(event, yamux.WentAway):
                log.debug("%s goes away with code %d", self.peer, event.code)
                continue
            if isinstance(event, yamux.Opened):
                stream = self._streams[event.stream] = MuxedStream(self, event.stream)
                try:
                    self._send_accepted.send_nowait(stream)
                except trio.WouldBlock:
                    raise RemoteProtocolError("the peer opens and resets streams too fast") from None
                continue
            known = self._streams.get(event.stream)
            if known is None:
                continue
            if isinstance(event, yamux.Received):
                known.received(event.data)
            elif isinstance(event, yamux.Ended):
                known.ended()
                self._forget_if_over(known)
            elif isinstance(event, yamux.Writable):
                known.window_opened()
            else:
                known.broke("the other side reset the stream")
                del self._streams[event.stream]

    # What streams ask for

    def queue_data(self, stream: int, data: memoryview) -> int:
        """Queue what the window takes of `data`; returns how many bytes."""
        size = self._mux.send(stream, data)
        self._wake_writer()
        return size

    def queue_end(self, stream: MuxedStream) -> None:
        """Say that a stream sends no more."""
        if not self.is_closed:
            self._mux.end(stream.stream_id)
            self._forget_if_over(stream)
            self._wake_writer()

    def _forget_if_over(self, stream: MuxedStream) -> None:
        """A stream that both sides ended has nothing to lose with the connection."""
        if stream.is_over:
            self._streams.pop(stream.stream_id, None)

    def queue_reset(self, stream: int) -> None:
        if self._streams.pop(stream, None) is not None and not self.is_closed:
            self._mux.reset(stream)
            self._wake_writer()

    def consumed(self, stream: int, size: int) -> None:
        if not self.is_closed:
            self._mux.consume(stream, size)
            self._wake_writer()

    def discard(self, stream: int) -> None:
        self._streams.pop(stream, None)
        if not self.is_closed:
            self._mux.discard(stream)
            self._wake_writer()

    async def room(self) -> None:
        """Wait while more than HIGH_WATER_BYTES wait to be sent; doesn't yield when there is room."""
        while self._mux.output_bytes > HIGH_WATER_BYTES and not self.is_closed:
            await self._drain.park()

    def _wake_writer(self) -> None:
        if self._mux.output_bytes:
            self._pending.unpark_all()

    # Opening and closing

    async def open_stream(self) -> ForLibp2p:
        """Open a stream; doesn't wait for the other side. Raises MuxedConnUnavailable, as libp2p expects."""
        await trio.lowlevel.checkpoint()
        try:
            return ForLibp2p(self.open_now())
        except StreamError as error:
            raise MuxedConnUnavailable(str(error)) from error

    def open_now(self) -> MuxedStream:
        """Open a stream at once. Raises StreamError."""
        if self.is_closed or self._closing:
            raise StreamError(f"the connection to {self.peer} is closed: {self.reason or 'by this side'}")
        stream_id = self._mux.open()
        stream = self._streams[stream_id] = MuxedStream(self, stream_id)
        self._wake_writer()
        return stream

    async def open(self, protocols: Sequence[str]) -> MuxedStream | None:
        """Open a stream under the first protocol that the peer speaks; None when it speaks none of them.

        Raises:
            StreamError: the connection is closed or was lost.
            RemoteProtocolError: the peer broke the negotiation.
        """
        stream = self.open_now()
        agreed = False
        try:
            protocol, early = await multistream.offer(stream, protocols)
            if protocol is None:
                return None
            stream.unread(early)
            stream.protocol = protocol
            agreed = True
            return stream
        finally:
            if not agreed:
                stream.reset()

    async def accept_stream(self) -> ForLibp2p:
        """The next stream that the other side opens. Raises MuxedConnUnavailable at the end."""
        try:
            return ForLibp2p(await self._accepted.receive())
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise MuxedConnUnavailable(self.reason or "closed") from error

    async def close(self) -> None:
        """End the connection: frames already queued get CLOSE_SECONDS to leave, streams break."""
        if not self.is_closed and not self._closing and self.event_started.is_set():
            self._closing = True
            self._mux.go_away()
            self._wake_writer()
            try:
                with trio.move_on_after(CLOSE_SECONDS):
                    while (self._mux.output_bytes or self._writing) and not self.is_closed:
                        await self._drain.park()
            finally:
                self.abort("closed by this side")
        self.abort("closed by this side")
        await trio.lowlevel.checkpoint()

    def abort(self, reason: str) -> None:
        """End the connection at once: never waits, may be called twice."""
        if self.is_closed:
            return
        self.reason = reason
        self.ended.set()
        with contextlib.suppress(OSError):
            self._stream.socket.close()
        self._send_accepted.close()
        for stream in list(self._streams.values()):
            stream.lost(f"the connection to {self.peer} was lost: {reason}")
        self._streams.clear()
        self._pending.unpark_all()
        self._drain.unpark_all()
        for watcher in self._watchers:
            watcher(self)

    def watch(self, watcher: Callable[[MuxedConnection], None]) -> None:
        """Call `watcher` when the connection ends; at once if it has."""
        if self.is_closed:
            watcher(self)
        else:
            self._watchers.append(watcher)

    @property
    def can_open(self) -> bool:
        """Whether new streams may be opened here."""
        return not (self.is_closed or self._closing or self._mux.gone)

    # libp2p's face

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        return self.ended.is_set()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [self.remote]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT

    def get_remote_address(self) -> tuple[str, int] | None:
        protocol = "ip6" if self.remote.protocols()[0].name == "ip6" else "ip4"
        host, port = self.remote.value_for_protocol(protocol), self.remote.value_for_protocol("tcp")
        return (str(host), int(port)) if host and port else None
