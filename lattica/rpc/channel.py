"""Frames over one stream: reading ahead, within bounds, and writing whole frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from lattica.errors import StreamError
from lattica.net.api import Stream
from lattica.protocols import KIB, MIB, PROBE_SECONDS, READ_AHEAD_BYTES
from lattica.rpc.call import Probe, pack
from lattica.rpc.codec import Part
from lattica.rpc.framing import Body, FrameReader

_READ_BYTES: Final = 64 * KIB
_MAX_READ_BYTES: Final = 1 * MIB
_PROBE: Final = pack(Probe())


class Budget:
    """How many bytes of large inbound frames one peer may have under way or unread, over all its streams."""

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes
        self._lot = trio.lowlevel.ParkingLot()

    async def take(self, size_bytes: int) -> None:
        while self._free < size_bytes:
            await self._lot.park()
        self._free -= size_bytes

    def give(self, size_bytes: int) -> None:
        self._free += size_bytes
        self._lot.unpark_all()


class Channel:
    """One stream as frames. At most one task takes frames; sending is safe from several.

    `take` reads from the stream itself, until `start_reading` gives that to a task. From then on the
    stream's end is noticed even while nobody takes frames: `on_end` is called. The task stops reading while
    READ_AHEAD_BYTES of whole frames wait to be taken, so that the other side's window fills up and it waits.
    """

    def __init__(self, stream: Stream, *, max_frame_bytes: int, budget: Budget | None = None) -> None:
        self.is_broken = False  # a frame was sent in part, or not at all: nothing may follow it
        self.is_ended = False  # nothing more will come from the other side
        self.on_end: Callable[[], None] | None = None
        self.idle_since = 0.0
        self._stream = stream
        self._reader = FrameReader(max_frame_bytes)
        self._budget = budget
        self._reserved = 0
        self._error: StreamError | None = None
        self._pumping = False
        self._arrivals = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._sending = False
        self._sent = trio.lowlevel.ParkingLot()

    async def send(self, parts: list[Part]) -> None:
        """Send one frame, after those that others are sending. Raises StreamError."""
        while self._sending:
            await self._sent.park()
        if self.is_broken:
            raise StreamError("the stream is broken off")
        self._sending = self.is_broken = True
        try:
            for part in parts:
                await self._stream.send_all(part)
            self.is_broken = False
        finally:
            self._sending = False
            if self._sent:
                self._sent.unpark()

    def head(self) -> Body | None:
        """The frame that `take` would give at once, if any."""
        return self._reader.head()

    async def take(self) -> Body | None:
        """The next frame, None after a clean end between frames.

        Raises RemoteProtocolError and StreamError.
        """
        while True:
            body = self.take_nowait()
            if body is not None:
                return body
            if self.is_ended:
                if self._error is not None:
                    raise StreamError(str(self._error)) from self._error
                if not self._reader.is_between_frames:
                    raise StreamError("the stream ended in the middle of a frame")
                return None
            if self._pumping:
                await self._arrivals.park()
            else:
                await self._read()

    def take_nowait(self) -> Body | None:
        """The next frame if it is here. Raises RemoteProtocolError."""
        body = self._reader.next()
        if body is not None:
            self._release(len(body[0]) + len(body[1]))
            if self._room:
                self._room.unpark()
        return body

    def start_reading(self, nursery: trio.Nursery) -> None:
        """Read in a task of its own until the stream ends, or the nursery is cancelled."""
        self._pumping = True  # before the task runs: from now on nobody else may read
        nursery.start_soon(self._pump)

    async def _pump(self) -> None:
        while not self.is_ended:
            while self._reader.unread >= READ_AHEAD_BYTES and not self.is_ended:
                with trio.move_on_after(PROBE_SECONDS) as waiting:
                    await self._room.park()
                if waiting.cancelled_caught:
                    await self._probe()
            if not self.is_ended:
                await self._read()
            if self._arrivals:
                self._arrivals.unpark_all()
        if self.on_end is not None:
            self.on_end()

    @property
    def is_reusable(self) -> bool:
        """Whether the stream stands between frames, with nothing unread and nothing wrong."""
        return not (self.is_broken or self.is_ended) and self._reader.is_between_frames

    def detach(self) -> None:
        """Go back to reading on demand, after the reading task has ended."""
        self._pumping = False
        self.on_end = None

    async def is_quiet(self) -> bool:
        """Whether a stream between calls still lives, as far as can be seen in a millisecond."""
        if not self.is_reusable:
            return False
        with trio.move_on_after(0.001) as scope:
            await self._read()
        return scope.cancelled_caught

    def reset(self) -> None:
        self.is_broken = True
        self._release(self._reserved)
        self._stream.reset()

    async def aclose(self) -> None:
        self._release(self._reserved)
        await self._stream.aclose()

    async def _read(self) -> None:
        missing = self._reader.missing
        if self._budget is not None and missing > READ_AHEAD_BYTES and not self._reserved:
            size = self._reader.announced
            await self._budget.take(size)
            self._reserved = size
        try:
            data = await self._stream.receive_some(max(_READ_BYTES, min(missing, _MAX_READ_BYTES)))
        except StreamError as error:
            self._error, data = error, b""
        if data:
            self._reader.feed(data)
        self.is_ended = not data or self._reader.is_failed

    async def _probe(self) -> None:
        # While we do not read we cannot see that the other side has left; a write to a reset stream fails.
        if self._sending:
            return  # and whoever is sending will see it
        try:
            await self.send(_PROBE)
        except StreamError as error:
            self._error, self.is_ended = error, True

    def _release(self, size_bytes: int) -> None:
        if self._reserved and size_bytes == self._reserved and self._budget is not None:
            self._budget.give(size_bytes)
            self._reserved = 0
