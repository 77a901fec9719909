"""One stream of a connection: ours for the project, and a face of it that libp2p's code takes.

Every way in which a stream can fail is a StreamError here: reset by either side, closed by this one, its
connection lost. libp2p's own exceptions stay inside `ForLibp2p`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from lattica.errors import LocalProtocolError, StreamError
from lattica.ids import PeerId

if TYPE_CHECKING:
    from lattica.net.connection import MuxedConnection


class MuxedStream:
    """A `lattica.net.api.Stream`. `protocol` is empty until the two sides have agreed on one."""

    def __init__(self, connection: MuxedConnection, stream_id: int) -> None:
        self.protocol = ""
        self.connection = connection
        self.stream_id = stream_id
        self._buffer: deque[bytes | memoryview] = deque()
        self._ended = False  # by the other side
        self._sent_eof = False
        self._broken_off = False
        self._error: str | None = None
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self.connection.peer

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `lattica.net.api.Stream.receive_some`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._buffer:
            if self._ended and not self._broken_off:
                return b""
            if self._error is not None:
                raise StreamError(self._error)
            await self._readable.park()
        piece = self._buffer.popleft()
        if max_bytes is not None and len(piece) > max_bytes:
            view = memoryview(piece)
            self._buffer.appendleft(view[max_bytes:])
            piece = view[:max_bytes]
        self.connection.consumed(self.stream_id, len(piece))
        return bytes(piece)

    def unread(self, data: bytes) -> None:
        """Put bytes back in front: what a negotiation read too much."""
        if data:
            self._buffer.appendleft(data)
            self.connection.consumed(self.stream_id, -len(data))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As `lattica.net.api.Stream.send_all`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        rest = memoryview(data).cast("B")
        self._check_sendable()
        while rest:
            await self.connection.room()  # and nobody else runs until the bytes are queued
            self._check_sendable()
            size = self.connection.queue_data(self.stream_id, rest)
            rest = rest[size:]
            if not size:
                await self._writable.park()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def send_eof(self) -> None:
        """As `lattica.net.api.Stream.send_eof`."""
        await trio.lowlevel.checkpoint()
        self._check_sendable()
        self._sent_eof = True
        self.connection.queue_end(self)

    async def aclose(self) -> None:
        """As `lattica.net.api.Stream.aclose`."""
        self.close()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """As `lattica.net.api.Stream.reset`."""
        self.connection.queue_reset(self.stream_id)
        self.broke("the stream was reset by this side")

    def close(self) -> None:
        """As `aclose`, without its checkpoint."""
        if self._error is None:
            if not self._sent_eof:
                self._sent_eof = True
                self.connection.queue_end(self)
            self.connection.discard(self.stream_id)
            self.broke("the stream was closed by this side")

    def _check_sendable(self) -> None:
        if self._error is not None:
            raise StreamError(self._error)
        if self._sent_eof:
            raise LocalProtocolError("nothing can be sent on a stream after send_eof")

    @property
    def is_open(self) -> bool:
        """Whether we may still send."""
        return self._error is None and not self._sent_eof

    @property
    def is_over(self) -> bool:
        """Whether both sides ended the stream."""
        return self._ended and self._sent_eof

    # What the connection tells

    def received(self, data: bytes) -> None:
        self._buffer.append(data)
        self._readable.unpark_all()

    def ended(self) -> None:
        self._ended = True
        self._readable.unpark_all()

    def window_opened(self) -> None:
        self._writable.unpark_all()

    def broke(self, reason: str) -> None:
        """The stream was reset or closed: what was not read is dropped."""
        self._broken_off = True
        self._buffer.clear()
        self.lost(reason)

    def lost(self, reason: str) -> None:
        """The connection ended: what arrived before can still be read."""
        if self._error is None:
            self._error = reason
        self._readable.unpark_all()
        self._writable.unpark_all()


class ForLibp2p(IMuxedStream):
    """The same stream as libp2p's code wants it."""

    muxed_conn: MuxedConnection

    def __init__(self, stream: MuxedStream) -> None:
        self.stream = stream
        self.muxed_conn = stream.connection

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

    async def __aenter__(self) -> ForLibp2p:
        return self

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()
