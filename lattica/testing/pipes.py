"""Streams in memory: bytes that take time to arrive, in order, within a window that the reader opens.

The model is a reliable transport such as TCP: lost packets cost time, never bytes. Nothing here runs in a
task of its own: each end works out, when it looks, what has arrived by then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Final

import trio

from lattica.errors import StreamError
from lattica.ids import PeerId

_CHUNK_BYTES: Final = 64 * 1024
_MIN_RETRANSMIT_SECONDS: Final = 0.2  # Linux' lower bound of the retransmission timeout


class Link:
    """One direction of a connection: when what is sent now arrives.

    Times are kept as they were stamped; `due` adds what a partition has held back since then.
    """

    def __init__(self, latency: float, loss: float, random: Random) -> None:
        self.latency = latency  # seconds, one way
        self.loss = loss  # probability that a chunk has to be sent again
        self._random = random
        self._last = 0.0
        self._stalls: list[tuple[float, float]] = []
        self._stalled_since: float | None = None

    def stamp(self) -> float:
        """The time at which something sent now arrives; never before what was sent earlier."""
        again = max(_MIN_RETRANSMIT_SECONDS, 2 * self.latency)
        lost = self.loss and self._random.random() < self.loss
        self._last = max(self._last, trio.current_time() + self.latency + (again if lost else 0.0))
        return self._last

    def due(self, stamp: float) -> float:
        """When something with this stamp can be read; infinity while a partition holds it."""
        for since, until in self._stalls:
            if since < stamp <= until + self.latency:
                stamp = until + self.latency
        return stamp if self._stalled_since is None or stamp <= self._stalled_since else math.inf

    def stall(self) -> None:
        if self._stalled_since is None:
            self._stalled_since = trio.current_time()

    def resume(self) -> None:
        if self._stalled_since is not None:
            self._stalls.append((self._stalled_since, trio.current_time()))
            self._stalled_since = None


class _Break:
    """When and why one end of a pipe stops working."""

    __slots__ = ("_link", "_stamp", "why")

    def __init__(self, why: str, link: Link | None) -> None:
        self.why = why
        self._link = link  # the word of it travels over this link; None: it is known at once
        self._stamp = 0.0 if link is None else link.stamp()

    @property
    def due(self) -> float:
        return 0.0 if self._link is None else self._link.due(self._stamp)


class Pipe:
    """One direction of a stream: a writer, a reader, and a window between them."""

    def __init__(self, link: Link, back: Link, window_bytes: int) -> None:
        self.link = link
        self.back = back  # the way that the reader's credit takes
        self._window = window_bytes
        self._chunks: deque[tuple[float, bytes]] = deque()  # b"" is the end
        self._credits: deque[tuple[float, int]] = deque()
        self._taken = 0  # bytes of the window that are in use
        self._writer_break: _Break | None = None
        self._reader_break: _Break | None = None
        self._is_discarding = False
        self._changed = trio.lowlevel.ParkingLot()

    async def write(self, data: memoryview) -> None:
        """Put bytes on their way, as the window allows. Raises StreamError."""
        while data:
            _check(self._writer_break)
            now = trio.current_time()
            while self._credits and self.back.due(self._credits[0][0]) <= now:
                self._taken -= self._credits.popleft()[1]
            room = min(self._window - self._taken, _CHUNK_BYTES)
            if room <= 0:
                credit = self.back.due(self._credits[0][0]) if self._credits else math.inf
                await self._wait(credit, self._writer_break)
                continue
            chunk, data = bytes(data[:room]), data[room:]
            self._taken += len(chunk)
            if self._is_discarding:
                self._credits.append((self.link.stamp() + self.back.latency, len(chunk)))
            else:
                self._put(chunk)

    def write_end(self) -> None:
        """Say that nothing more comes. Raises StreamError."""
        _check(self._writer_break)
        self._put(b"")

    async def read(self, max_bytes: int) -> bytes:
        """Bytes that have arrived, b"" at the end. Raises StreamError."""
        while True:
            _check(self._reader_break)
            due = self.link.due(self._chunks[0][0]) if self._chunks else math.inf
            if due <= trio.current_time():
                break
            await self._wait(due, self._reader_break)
        stamp, chunk = self._chunks[0]
        if not chunk:
            return b""
        if len(chunk) > max_bytes:
            self._chunks[0] = (stamp, chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        else:
            self._chunks.popleft()
        self._credits.append((self.back.stamp(), len(chunk)))
        self.wake()
        return chunk

    def discard(self) -> None:
        """The reader wants no more: what is written goes nowhere, at the pace of somebody who reads it all."""
        self._is_discarding = True
        for _, chunk in self._chunks:
            self._credits.append((self.back.stamp(), len(chunk)))
        self._chunks.clear()
        self._reader_break = self._reader_break or _Break("the stream is closed", None)
        self.wake()

    def break_writer(self, why: str, over: Link | None) -> None:
        self._writer_break = self._writer_break or _Break(why, over)
        self.wake()

    def break_reader(self, why: str, over: Link | None) -> None:
        self._reader_break = self._reader_break or _Break(why, over)
        self.wake()

    def wake(self) -> None:
        """Let both ends look again at what has changed."""
        self._changed.unpark_all()

    def _put(self, chunk: bytes) -> None:
        self._chunks.append((self.link.stamp(), chunk))
        self.wake()

    async def _wait(self, until: float, end: _Break | None) -> None:
        with trio.move_on_at(until if end is None else min(until, end.due)):
            await self._changed.park()


def _check(end: _Break | None) -> None:
    if end is not None and end.due <= trio.current_time():
        raise StreamError(end.why)


class MemoryStream:
    """A `lattica.net.api.Stream` over two pipes."""

    def __init__(self, peer: PeerId, protocol: str, incoming: Pipe, outgoing: Pipe) -> None:
        self.peer = peer
        self.protocol = protocol
        self._incoming = incoming
        self._outgoing = outgoing
        self.on_close: Callable[[MemoryStream], None] | None = None
        self._is_ended = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self._is_ended:
            raise StreamError("send_all after send_eof")
        await self._outgoing.write(memoryview(data).cast("B"))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return await self._incoming.read(_CHUNK_BYTES if max_bytes is None else max_bytes)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._is_ended:
            self._is_ended = True
            self._outgoing.write_end()

    async def aclose(self) -> None:
        try:
            if not self._is_ended:
                self._is_ended = True
                self._outgoing.write_end()
        except StreamError:
            pass  # broken already: closed enough
        self._incoming.discard()
        self._closed()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        link = self._outgoing.link  # the other end hears of it when the word has crossed
        self._outgoing.break_writer("the stream was reset here", None)
        self._incoming.break_reader("the stream was reset here", None)
        self._outgoing.break_reader("the peer reset the stream", link)
        self._incoming.break_writer("the peer reset the stream", link)
        self._is_ended = True
        self._closed()

    def lose(self, why: str) -> None:
        """Break this end at once: the connection is gone."""
        self._outgoing.break_writer(why, None)
        self._incoming.break_reader(why, None)

    def _closed(self) -> None:
        if self.on_close is not None:
            self.on_close(self)

    def wake(self) -> None:
        """Let both ends look again: what was held back may have come."""
        self._outgoing.wake()
        self._incoming.wake()
