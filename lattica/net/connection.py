"""One connection and its streams: a mux driven over a socket by one reading and one writing task.

Nobody but the writer touches what leaves. Whoever sends hands whole frames to the mux and may be cancelled at any
point; the connection never sees half a frame. Everything that tasks queue in one pass of the scheduler leaves in one
system call, and what one read brought wakes its readers in a few shares. A connection that is lost breaks its
streams with StreamError, never with a clean end.
"""

from __future__ import annotations

import contextlib
import logging
import socket as stdlib_socket
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio
from multiaddr import Multiaddr

from lattica.errors import RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net import multistream, mux, sockets
from lattica.net.stream import MuxedStream
from lattica.protocols import KIB, PING_INTERVAL_SECONDS, PING_SOONER_SECONDS, PING_TIMEOUT_SECONDS

log = logging.getLogger("lattica.net.connection")

MIN_READ_BYTES: Final = 16 * KIB  # asked for in one read; doubled while reads are filled
MAX_READ_BYTES: Final = 120 * KIB  # from 128 KiB on malloc takes fresh pages each time
MIN_BATCH_BYTES: Final = 64 * KIB  # sealed and sent at once; doubled while the socket takes it
MAX_BATCH_BYTES: Final = 128 * KIB
FIRST_PINGS: Final = 5  # in a row: windows grow by the least round trip, and a start is busy
MIN_SHARE: Final = 8  # of a read's readers that are woken before the writer's next turn
MAX_SHARE: Final = 32
CLOSE_SECONDS: Final = 1.0  # for the last frames to leave, and for the other side to hang up
BROKE_PROTOCOL: Final = 1  # GO_AWAY's code


class Owner(Protocol):
    """Whom a connection tells what happens to it. Called from its reading task; must not wait."""

    def stream_opened(self, stream: MuxedStream) -> None:
        """The other side opened a stream."""

    def ponged(self, connection: MuxedConnection, rtt: float) -> None:
        """A ping came back after `rtt` seconds."""


class Traffic:
    """What all connections of a node have moved, in bytes on the wire and in streams."""

    __slots__ = ("received_bytes", "sent_bytes", "streams_accepted", "streams_opened")

    def __init__(self) -> None:
        self.received_bytes = self.sent_bytes = self.streams_accepted = self.streams_opened = 0


class MuxedConnection:
    """One secured connection. `run` runs it until it ends; nothing happens before.

    Args:
        sock: connected and non-blocking; owned and closed by the connection.
        machine: not started yet.
        early: plaintext that already followed the choice of the muxer.
        remote: the other end's transport address, without /p2p/.
    """

    def __init__(
        self,
        sock: stdlib_socket.socket,
        machine: mux.Mux,
        *,
        peer: PeerId,
        initiator: bool,
        early: bytes = b"",
        remote: Multiaddr,
        traffic: Traffic | None = None,
    ) -> None:
        self.peer = peer
        self.remote = remote
        self.is_initiator = initiator
        self.mux = machine
        self.spoken: frozenset[str] = frozenset()  # protocols that the peer is known to speak
        self.ended = trio.Event()
        self.is_closed = False
        self.reason = ""  # why it ended, for people
        self.heard = trio.current_time()  # when bytes last came
        self._traffic = traffic or Traffic()
        self._sock = sock
        self._early = early
        self._owner: Owner | None = None
        self._streams: dict[int, MuxedStream] = {}
        self._short: list[MuxedStream] = []
        self._writer: trio.lowlevel.Task | None = None  # while it has nothing to send
        self._sealed = memoryview(b"")  # what the socket did not take yet
        self._batch = MIN_BATCH_BYTES
        self._drained = trio.lowlevel.ParkingLot()
        self._closing = False
        self._pinged: float | None = None  # when; None when an answer came
        self._last_ping = self.heard
        self._pongs = 0
        self._took = self.heard  # when the kernel last had room again for a writer that waited
        self.spoke = False  # a stream sent something, and nothing was heard since
        self._watchers: list[Callable[[MuxedConnection], None]] = []

    # Running

    async def run(self, owner: Owner) -> None:
        """Read and write until the connection ends. Raises nothing but Cancelled."""
        self._owner = owner
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        except Exception:  # a bug of ours: it costs this connection
            log.exception("the connection to %s failed", self.peer)
        finally:
            self.abort("this node stopped")

    async def _read(self) -> None:
        sock, machine = self._sock, self.mux
        size = MIN_READ_BYTES
        try:
            await self._wake(self._dispatch(machine.start(self._early)))
            self._ping(trio.current_time())
            while not self.is_closed:
                await trio.lowlevel.wait_readable(sock.fileno())
                try:
                    data = sock.recv(size)
                except BlockingIOError:
                    continue
                if not data:
                    self.abort(self.reason or "the other side closed the connection")
                    return
                if len(data) == size:
                    size = min(2 * size, MAX_READ_BYTES)
                elif len(data) * 4 < size:
                    size = max(size // 2, MIN_READ_BYTES)
                now = self.heard = trio.current_time()
                self._pinged, self.spoke = None, False
                self._traffic.received_bytes += len(data)
                await self._wake(self._dispatch(machine.receive(data, now)))
        except RemoteProtocolError as error:
            log.info("closing the connection to %s: %s", self.peer, error)
            machine.go_away(BROKE_PROTOCOL)
            with contextlib.suppress(OSError):
                self._flush()
            self.abort(str(error))
        except OSError as error:
            self._lost(error)
        except trio.ClosedResourceError:  # `abort` did it
            return

    async def _wake(self, heard: list[MuxedStream]) -> None:
        """Wake the readers of one read in shares: the other end works on what the first one led to while the second is
        at work here. Woken all at once, two ends with many calls in flight take turns, and each idles half of the time.
        """
        share = min(MAX_SHARE, max(MIN_SHARE, len(heard) // 2))
        for start in range(0, len(heard), share):
            if start:
                await trio.lowlevel.checkpoint()
            for stream in heard[start : start + share]:
                if not stream.arrived():
                    self._short.append(stream)

    async def _write(self) -> None:
        try:
            while not self.is_closed:
                if not self._flush():
                    await trio.lowlevel.wait_writable(self._sock.fileno())
                    self._took = trio.current_time()
                elif self.mux.output_bytes:  # a batch was taken: let others queue beside what is left
                    await trio.lowlevel.checkpoint()
                else:
                    self._drained.unpark_all()
                    await self._work()
        except OSError as error:
            self._lost(error)
        except trio.ClosedResourceError:
            return

    async def _work(self) -> None:
        """Wait until there is something to send."""
        self._writer = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def flush_soon(self) -> None:
        """Let what was queued leave when the tasks of this pass have run."""
        writer = self._writer
        if writer is not None and self.mux.output_bytes:
            self._writer = None
            trio.lowlevel.reschedule(writer)

    def _flush(self) -> bool:
        """Send one batch; False when the socket is full. Raises OSError."""
        if not self._sealed:
            sealed, free = self.mux.take_output(self._batch)
            for stream_id in free:
                stream = self._streams.get(stream_id)
                if stream is not None:
                    stream.writable()
            if not sealed:
                return True
            self._sealed = memoryview(sealed)
        try:
            sent = self._sock.send(self._sealed)
        except BlockingIOError:
            return False
        self._traffic.sent_bytes += sent
        if sent < len(self._sealed):
            self._sealed = self._sealed[sent:]
            self._batch = max(MIN_BATCH_BYTES, min(sent, self._batch))
            return False
        self._sealed = memoryview(b"")
        if sent >= self._batch:
            self._batch = min(2 * self._batch, MAX_BATCH_BYTES)
        return True

    def _dispatch(self, events: list[mux.Event]) -> list[MuxedStream]:
        """Tell all streams at once what changed for them, but whose bytes came: those are returned."""
        heard, self._short = self._short, []  # those whose readers wait for more than had come hear it too
        streams = self._streams
        for kind, stream_id, value in events:
            stream = streams.get(stream_id)
            if stream is None:
                if kind == mux.OPENED:
                    stream = streams[stream_id] = MuxedStream(self, stream_id)
                    self._traffic.streams_accepted += 1
                    if self._owner is not None:
                        self._owner.stream_opened(stream)
                elif kind == mux.PONG and self._owner is not None:
                    self._pongs += 1
                    if self._pongs < FIRST_PINGS:
                        self._ping(trio.current_time())
                    self._owner.ponged(self, value / 1e6)
                elif kind == mux.WENT_AWAY:
                    self._went_away(value)
            elif kind == mux.READABLE:
                stream.was_heard = True
                heard.append(stream)
            elif kind == mux.WRITABLE:
                stream.writable()
            elif kind == mux.ENDED:
                stream.ended()
                self.over(stream)
            elif kind == mux.RESET:
                del streams[stream_id]
                stream.broke(
                    "too much of this connection was left unread, and most of it here"
                    if value
                    else "the other side reset the stream"
                )
        self.flush_soon()
        return heard

    def _went_away(self, code: int) -> None:
        """The other side takes no more streams. One that says it with an error may go on with those that it has:
        rust-yamux does so at its 512th."""
        log.debug("%s goes away with code %d", self.peer, code)
        if code:
            for stream in [one for one in self._streams.values() if not one.was_heard]:
                if stream.stream_id % 2 == self.is_initiator:  # ours: the dialler's ids are odd
                    self.mux.reset(stream.stream_id)
                    self.forget(stream)
                    stream.broke("the other side takes no more streams on this connection")

    # Streams

    def forget(self, stream: MuxedStream) -> None:
        """Tell a stream nothing any more."""
        self._streams.pop(stream.stream_id, None)

    def over(self, stream: MuxedStream) -> None:
        """A stream that both sides ended has nothing to lose with the connection."""
        if stream.is_over:
            self.forget(stream)

    def open_now(self) -> MuxedStream:
        """Open a stream at once, under no protocol yet. Raises StreamError."""
        if self.is_closed or self._closing:
            raise StreamError(f"the connection to {self.peer} is closed: {self.reason or 'by this side'}")
        stream_id = self.mux.open_stream()
        stream = self._streams[stream_id] = MuxedStream(self, stream_id)
        self._traffic.streams_opened += 1
        self.flush_soon()
        return stream

    async def open(self, protocols: Sequence[str]) -> MuxedStream | None:
        """Open a stream under the first protocol that the peer speaks; None when it speaks none of them.

        Returns at once, the proposal on its way, when the peer is known to speak one of them, or when there is one
        only and it has not yet said what it speaks. Should it refuse, the first receive says so.

        Raises:
            StreamError: the connection is closed or was lost.
            RemoteProtocolError: the peer broke the negotiation.
        """
        known = next((protocol for protocol in protocols if protocol in self.spoken), None)
        if known is None and not self.spoken and len(protocols) == 1:
            known = protocols[0]
        stream = self.open_now()
        agreed = False
        try:
            if known is not None:
                await trio.lowlevel.checkpoint_if_cancelled()
                stream.propose(known)
            else:
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

    # Life and death

    def check(self, now: float) -> None:
        """Ping when it is time, and end a connection whose other side is mute. Called every second or so.

        A slow link may take longer than the limit for a ping and what stands before it: as long as the kernel gets
        rid of bytes, somebody takes them.
        """
        if self._pinged is not None:
            if now - max(self._pinged, self._took) >= PING_TIMEOUT_SECONDS:
                self.abort(f"nothing came within {PING_TIMEOUT_SECONDS:g} seconds after a ping")
            return
        waits = self.spoke or len(self._sealed) > 0 or self.mux.output_bytes > 0
        quiet = min(now - self.heard, now - self._last_ping)
        if now - self._last_ping >= PING_INTERVAL_SECONDS or (waits and quiet >= PING_SOONER_SECONDS):
            self._ping(now)

    def _ping(self, now: float) -> None:
        self.mux.ping(now)
        self._pinged = self._last_ping = now
        self.flush_soon()

    async def close(self) -> None:
        """End the connection: what is queued gets CLOSE_SECONDS to leave and arrive, streams break."""
        if not self.is_closed and not self._closing and self._owner is not None:
            self._closing = True
            self.reason = "closed by this side"
            self.mux.go_away()
            self.flush_soon()
            try:
                with trio.move_on_after(CLOSE_SECONDS):
                    while (self.mux.output_bytes or self._sealed) and not self.is_closed:
                        await self._drained.park()
                    with contextlib.suppress(OSError):
                        self._sock.shutdown(stdlib_socket.SHUT_WR)
                    await self.ended.wait()  # their end: a close now could cut off what they have not read
            finally:
                self.abort(self.reason)
        self.abort("closed by this side")
        await trio.lowlevel.checkpoint()

    def abort(self, reason: str) -> None:
        """End the connection at once: never waits, may be called twice."""
        if self.is_closed:
            return
        self.reason = reason
        self.is_closed = True
        self.ended.set()
        sockets.close(self._sock)
        for stream in list(self._streams.values()):
            stream.lost(f"the connection to {self.peer} was lost: {reason}")
        self._streams.clear()
        self._drained.unpark_all()
        for watcher in self._watchers:
            watcher(self)

    def _lost(self, error: OSError) -> None:
        self.abort(f"the connection was lost ({error.strerror or error})")

    def watch(self, watcher: Callable[[MuxedConnection], None]) -> None:
        """Call `watcher` when the connection ends; at once if it has."""
        if self.is_closed:
            watcher(self)
        else:
            self._watchers.append(watcher)

    @property
    def can_open(self) -> bool:
        """Whether new streams may be opened here."""
        return not (self.is_closed or self._closing or self.mux.gone)

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)
