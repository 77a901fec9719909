"""One stream of a connection, as `lattica.net.api.Stream`.

What arrived and what waits to be sent stand in the connection's mux; a stream keeps who waits for it. Every way in
which it can fail is a StreamError: reset by either side, closed by this one, its connection lost, the protocol
refused. Sending and receiving check for cancellation and yield to other tasks only when they have to wait: a pass
through the scheduler costs more than a small message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net.multistream import LazyOffer
from lattica.protocols import KIB

if TYPE_CHECKING:
    from lattica.net.connection import MuxedConnection

log = logging.getLogger("lattica.net.stream")

READ_BYTES = 120 * KIB  # one read takes what has arrived, up to this: as one of the connection's
# Of what a reader knows is to come, enough to wake it; less than half of the smallest window, so that it
# can arrive unread. A large message among others' comes in frames of 16 KiB, and a wake-up costs more than opening one.
ENOUGH_BYTES = 64 * KIB


class MuxedStream:
    """`protocol` is empty until the two sides have agreed on one. One task may read and one may send at a time."""

    __slots__ = (
        "_broken_off",
        "_ended",
        "_enough",
        "_error",
        "_front",
        "_mux",
        "_offer",
        "_on_break",
        "_reader",
        "_sent_eof",
        "_writer",
        "connection",
        "protocol",
        "stream_id",
        "was_heard",
    )

    def __init__(self, connection: MuxedConnection, stream_id: int) -> None:
        self.protocol = ""
        self.connection = connection
        self.stream_id = stream_id
        self.was_heard = False  # something came from the other side
        self._mux = connection.mux
        self._front = b""  # what a negotiation read too much
        self._offer: LazyOffer | None = None  # whose answer has not come yet
        self._ended = False  # by the other side
        self._sent_eof = False
        self._broken_off = False  # what has arrived counts no more
        self._error: str | None = None
        self._reader: trio.lowlevel.Task | None = None
        self._enough = 1  # bytes that it waits for
        self._writer: trio.lowlevel.Task | None = None
        self._on_break: Callable[[], None] | None = None

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self.connection.peer

    # Receiving

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `lattica.net.api.Stream.receive_some`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while (data := self.receive_nowait(max_bytes)) is None:
            await self._arrival()
        return data

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """As `lattica.net.api.Stream.receive_nowait`."""
        if max_bytes is None:
            max_bytes = READ_BYTES
        if self._offer is not None:
            self._hear_answer()
        if not self._broken_off:
            if self._front:
                data, self._front = self._front[:max_bytes], self._front[max_bytes:]
                return data
            data = self._mux.read(self.stream_id, max_bytes)
            if data:
                self.connection.flush_soon()  # the credit for it
                return data
        return self._nothing()

    async def receive_into(self, buffer: memoryview, enough: int = 1) -> int:
        """As `lattica.net.api.Stream.receive_into`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._offer is None and not self._front and not self._broken_off:
                size = self._mux.read_into(self.stream_id, buffer)
                if size:
                    self.connection.flush_soon()
                    return size
            data = self.receive_nowait(len(buffer))
            if data is not None:
                buffer[: len(data)] = data
                return len(data)
            await self._arrival(1 if self._offer is not None else min(enough, len(buffer), ENOUGH_BYTES))

    def _nothing(self) -> bytes | None:
        """What it means that no bytes are here. Raises StreamError."""
        if self._ended and not self._broken_off and self._offer is None:
            return b""
        if self._error is not None:
            raise StreamError(self._error)
        return None

    async def _arrival(self, enough: int = 1) -> None:
        """Wait until so many bytes are here, or no more will come."""
        if self._reader is not None:
            raise trio.BusyResourceError("another task reads from this stream")
        self._enough = enough
        self._reader = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._reader = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def unread(self, data: bytes) -> None:
        """Put bytes back in front: what a negotiation read too much."""
        self._front = data + self._front

    # Sending

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As `lattica.net.api.Stream.send_all`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._writer is not None:
            raise trio.BusyResourceError("another task sends on this stream")
        if type(data) is not bytes:
            data = memoryview(data).cast("B")
        while data:
            self._check_sendable()
            taken = self._mux.send(self.stream_id, data)
            self.connection.spoke = True
            self.connection.flush_soon()
            if taken == len(data):
                return
            data = memoryview(data)[taken:]
            await self._room()
        self._check_sendable()

    def send_nowait(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        """As `lattica.net.api.Stream.send_nowait`."""
        self._check_sendable()
        if self._writer is not None or not self._mux.send_all_or_nothing(self.stream_id, parts):
            return False
        self.connection.spoke = True
        self.connection.flush_soon()
        return True

    async def _room(self) -> None:
        self._writer = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def send_eof(self) -> None:
        """As `lattica.net.api.Stream.send_eof`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_sendable()
        self._end()

    def _check_sendable(self) -> None:
        if self._error is not None:
            raise StreamError(self._error)
        if self._sent_eof:
            raise LocalProtocolError("nothing can be sent on a stream after send_eof")

    def _end(self) -> None:
        if not self._sent_eof:
            self._sent_eof = True
            self._mux.end(self.stream_id)
            self.connection.over(self)
            self.connection.flush_soon()

    # Closing

    async def aclose(self) -> None:
        """As `lattica.net.api.Stream.aclose`."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """As `aclose`, without its checkpoint."""
        if self._error is None:
            self._end()
            self._mux.discard(self.stream_id)
            self._leave("the stream was closed by this side")

    def reset(self) -> None:
        """As `lattica.net.api.Stream.reset`."""
        if self._error is None:
            self._mux.reset(self.stream_id)
        self._leave("the stream was reset by this side")

    def _leave(self, reason: str) -> None:
        self._on_break = None  # that is for what others do
        self._broken_off = True
        self._front = b""
        self.connection.forget(self)
        self.connection.flush_soon()
        self._fail(reason)

    @property
    def is_open(self) -> bool:
        """Whether we may still send."""
        return self._error is None and not self._sent_eof

    @property
    def is_over(self) -> bool:
        """Whether both sides ended the stream."""
        return self._ended and self._sent_eof

    def on_break(self, callback: Callable[[], None] | None) -> None:
        """As `lattica.net.api.Stream.on_break`."""
        self._on_break = callback
        if self._error is not None:
            self._call_back()

    # Agreeing on the protocol

    def propose(self, protocol: str) -> None:
        """Offer a protocol that the other side is known to speak; nobody waits for the answer until a read."""
        self._offer = LazyOffer(protocol)
        self.protocol = protocol
        if self._mux.send(self.stream_id, self._offer.proposal) < len(self._offer.proposal):
            raise StreamError("the connection has no room for another stream now")  # over 1 MiB waits already
        self.connection.flush_soon()

    def _hear_answer(self) -> None:
        assert self._offer is not None
        data = self._mux.read(self.stream_id, READ_BYTES)
        if not data:
            if self._ended and self._error is None:
                self.reset()
                self._error = f"{self.peer} ended a stream before it agreed on {self.protocol}"
            return
        try:
            rest = self._offer.feed(data)
        except (StreamError, RemoteProtocolError) as error:
            self._offer = None
            self.reset()
            self._error = str(error) if isinstance(error, RemoteProtocolError) else f"{self.peer} {error}"
            return
        if rest is not None:
            self._offer = None
            self._front = rest
            self.connection.flush_soon()  # the credit for all that came with the answer

    # What the connection tells

    def arrived(self) -> bool:
        """Bytes came. False when the reader waits for more of them: ask again when more came."""
        if (
            self._reader is not None
            and self._enough > 1
            and self._mux.available(self.stream_id) < self._enough
        ):
            return False
        self.readable()
        return True

    def readable(self) -> None:
        """Bytes came, or will come no more."""
        task, self._reader = self._reader, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def ended(self) -> None:
        """The other side sends no more."""
        self._ended = True
        self.readable()

    def writable(self) -> None:
        """There is room again."""
        task, self._writer = self._writer, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def broke(self, reason: str) -> None:
        """The stream was reset: what was not read is dropped."""
        self._broken_off = True
        self._front = b""
        self.lost(reason)

    def lost(self, reason: str) -> None:
        """The connection ended: what arrived before can still be read."""
        self._fail(reason)
        self._call_back()

    def _fail(self, reason: str) -> None:
        if self._error is None:
            self._error = reason
        self.readable()
        self.writable()

    def _call_back(self) -> None:
        callback, self._on_break = self._on_break, None
        if callback is not None:
            try:
                callback()
            except Exception:  # its bug must not end the connection, which is in the middle of something
                log.exception("what a stream was told to call when it breaks failed")
