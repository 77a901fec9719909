"""Streams in memory: bytes that take time to arrive, in order, within a window that the reader opens.

The model is a reliable transport such as TCP: lost packets cost time, never bytes. Each end works out, when it
looks, what has arrived by then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from lattica.errors import StreamError
from lattica.ids import PeerId
from lattica.protocols import KIB
from lattica.testing.links import Link

_READ_BYTES: Final = 64 * KIB

Data = bytes | bytearray | memoryview
Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Break:
    """When and why one end of a stream stops working. `over`: the link that the word of it takes; None: at once."""

    __slots__ = ("_link", "_stamp", "spares_unread", "why")

    def __init__(self, why: str, over: Link | None = None, *, spares_unread: bool = False) -> None:
        self.why = why
        self.spares_unread = spares_unread  # what has arrived before can still be read
        self._link = over
        self._stamp = 0.0 if over is None else over.stamp()

    @property
    def due(self) -> float:
        return 0.0 if self._link is None else self._link.due(self._stamp)

    @property
    def is_due(self) -> bool:
        return self.due <= trio.current_time()


class Pipe:
    """One direction of a stream: a writer, a reader, and a window between them."""

    def __init__(self, link: Link, back: Link, window_bytes: int) -> None:
        self.link = link
        self.back = back  # the way that the reader's credit takes
        self.queued = 0
        self._window = window_bytes
        self._output: deque[bytes] = deque()  # b"" is the end
        self._arrivals: deque[tuple[float, bytes]] = deque()
        self._credits: deque[tuple[float, int]] = deque()
        self._taken = 0  # bytes of the window that are in use
        self._writer_break: Break | None = None
        self._reader_break: Break | None = None
        self._is_discarding = False
        self._changed = trio.lowlevel.ParkingLot()

    # The writer's end

    async def write(self, data: memoryview) -> None:
        """Put bytes on their way, as window and queue allow. Raises StreamError."""
        while data:
            if room := self.room():
                self.put(bytes(data[:room]))
                data = data[room:]
            else:
                credit = self.back.due(self._credits[0][0]) if self._credits else math.inf
                await self.wait(min(credit, self.link.next_at()), self._writer_break)

    def room(self) -> int:
        """How many bytes can be put now. Raises StreamError."""
        _check(self._writer_break)
        self.link.advance()
        now = trio.current_time()
        while self._credits and self.back.due(self._credits[0][0]) <= now:
            self._taken -= self._credits.popleft()[1]
        return min(self._window - self._taken, self.link.room(self))

    def put(self, data: bytes) -> None:
        """Queue bytes for which there is room."""
        self._taken += len(data)
        self.queued += len(data)
        self._output.append(data)
        self.link.add(self)
        self.wake()

    def put_end(self) -> None:
        """Say that nothing more comes. Raises StreamError."""
        _check(self._writer_break)
        self.put(b"")

    def break_writer(self, end: Break) -> None:
        self._writer_break = _first(self._writer_break, end)
        self.wake()

    # What the link asks

    def take(self, max_bytes: int) -> tuple[bytes, bool]:
        frame = self._output.popleft()
        if len(frame) > max_bytes:
            self._output.appendleft(frame[max_bytes:])
            frame = frame[:max_bytes]
        self.queued -= len(frame)
        return frame, bool(self._output)

    def left(self, frame: bytes, arrives: float) -> None:
        if self._is_discarding:
            self._credits.append((arrives + self.back.latency, len(frame)))
        else:
            self._arrivals.append((arrives, frame))

    # The reader's end

    def read(self, max_bytes: int) -> bytes | None:
        """Bytes that have arrived, b"" at the end, None when there are none. Raises StreamError."""
        end = self._reader_break
        if end is None or not end.spares_unread:
            _check(end)
            self.link.advance()
        parts: list[bytes] = []
        size, now = 0, trio.current_time()
        while size < max_bytes and self._arrivals and self.link.due(self._arrivals[0][0]) <= now:
            stamp, chunk = self._arrivals[0]
            if not chunk:
                if not parts:
                    return b""
                break
            self._arrivals.popleft()
            if len(chunk) > max_bytes - size:
                self._arrivals.appendleft((stamp, chunk[max_bytes - size :]))
                chunk = chunk[: max_bytes - size]
            parts.append(chunk)
            size += len(chunk)
        if not parts:
            _check(end)
            return None
        self._credits.append((self.back.stamp(), size))
        self.wake()
        return b"".join(parts)

    async def wait_readable(self) -> None:
        """Until `read` may have something new to say."""
        if self._arrivals:
            until = self.link.due(self._arrivals[0][0])
        else:
            until = self.link.next_at() if self._output else math.inf
        await self.wait(until, self._reader_break)

    def discard(self) -> None:
        """The reader wants no more: what is written goes nowhere, at the pace of somebody who reads it all."""
        self._is_discarding = True
        for _, chunk in self._arrivals:
            self._credits.append((self.back.stamp(), len(chunk)))
        self._arrivals.clear()
        self.break_reader(Break("the stream is closed"))

    def break_reader(self, end: Break) -> None:
        self._reader_break = _first(self._reader_break, end)
        if end.spares_unread:  # what has not arrived by now never will
            self.link.advance()
            now = trio.current_time()
            while self._arrivals and self.link.due(self._arrivals[-1][0]) > now:
                self._arrivals.pop()
        self.wake()

    # Both

    def drop_output(self) -> None:
        """What is not on its way yet never will be."""
        self._output.clear()
        self.queued = 0
        self.link.remove(self)

    def wake(self) -> None:
        """Let both ends look again at what has changed."""
        self._changed.unpark_all()

    async def wait(self, until: float, end: Break | None) -> None:
        """Until a time, a break, or a change."""
        with trio.move_on_at(until if end is None else min(until, end.due)):
            await self._changed.park()


def _check(end: Break | None) -> None:
    if end is not None and end.is_due:
        raise StreamError(end.why)


def _first(one: Break | None, other: Break) -> Break:
    return one if one is not None and one.due <= other.due else other


class MemoryStream:
    """A `lattica.net.api.Stream` over two pipes. `twin` is its other end."""

    twin: MemoryStream

    def __init__(self, peer: PeerId, protocol: str, incoming: Pipe, outgoing: Pipe, spawn: Spawn) -> None:
        self.peer = peer
        self.protocol = protocol
        self.on_close: Callable[[MemoryStream], None] | None = None
        self._incoming = incoming
        self._outgoing = outgoing
        self._spawn = spawn
        self._is_ended = False
        self._is_reset = False
        self._is_closed = False
        self._their_break: Break | None = None
        self._tell_break: Callable[[], None] | None = None

    async def send_all(self, data: Data) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open()
        await self._outgoing.write(memoryview(data).cast("B"))

    def send_nowait(self, parts: Sequence[Data]) -> bool:
        self._check_open()
        data = b"".join(parts)
        if len(data) > self._outgoing.room():
            return False
        if data:
            self._outgoing.put(data)
        return True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while (data := self.receive_nowait(max_bytes)) is None:
            await self._incoming.wait_readable()
        return data

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        return self._incoming.read(_READ_BYTES if max_bytes is None else max_bytes)

    async def receive_into(self, buffer: memoryview, enough: int = 1) -> int:
        target = buffer.cast("B")
        data = await self.receive_some(len(target))
        target[: len(data)] = data
        return len(data)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._is_ended:
            self._is_ended = True
            self._outgoing.put_end()

    async def aclose(self) -> None:
        try:
            if not self._is_ended:
                self._is_ended = True
                self._outgoing.put_end()
        except StreamError:
            pass  # broken already: closed enough
        self._incoming.discard()
        self._close()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        if self._is_reset:
            return
        self._is_reset = self._is_ended = True
        here = Break("the stream was reset here")
        there = Break("the peer reset the stream", self._outgoing.link)
        self._outgoing.break_writer(here)
        self._outgoing.drop_output()
        self._incoming.break_reader(here)
        self._outgoing.break_reader(there)
        self._incoming.break_writer(there)
        self.twin.broken(there)
        self._close()

    def on_break(self, callback: Callable[[], None] | None) -> None:
        self._tell_break = callback
        if callback is None or self._their_break is None:
            return
        if self._their_break.is_due:
            self._tell()
        else:
            self._spawn(self._tell_later)

    def lose(self, why: str) -> None:
        """Break this end at once: the connection is gone. What has arrived can still be read."""
        lost = Break(why, spares_unread=True)
        self._outgoing.break_writer(lost)
        self._outgoing.drop_output()
        self._incoming.break_reader(lost)
        self.broken(lost)

    def broken(self, end: Break) -> None:
        """The other side, or the network, has broken this stream, or the word of it is on its way."""
        if self._is_closed:
            return
        self._their_break = _first(self._their_break, end)
        if self._tell_break is not None:
            self._spawn(self._tell_later)  # never from inside of the other side's reset()

    async def _tell_later(self) -> None:
        while self._their_break is not None and not self._their_break.is_due:
            await self._incoming.wait(math.inf, self._their_break)
        self._tell()

    def _tell(self) -> None:
        callback, self._tell_break = self._tell_break, None
        if callback is not None:
            callback()

    def _check_open(self) -> None:
        if self._is_ended and not self._is_reset:
            raise StreamError("nothing can be sent after send_eof")

    def _close(self) -> None:
        self._is_closed = True
        self._tell_break = None
        if self.on_close is not None:
            self.on_close(self)

    def wake(self) -> None:
        """Let both ends look again: what was held back may have come."""
        self._outgoing.wake()
        self._incoming.wake()
