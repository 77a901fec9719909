"""Frames over one stream. No task reads it: who wants a frame waits for it, and bytes wait in the connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from lattica.errors import RemoteProtocolError, StreamError
from lattica.net.api import Stream
from lattica.protocols import KIB, READ_BYTES, SMALL_FRAME_BYTES
from lattica.rpc.codec import Part
from lattica.rpc.framing import Body, FrameReader

_HEAD_BYTES: Final = 2 * KIB  # asked for where a large frame may follow, whose section is received into place
_TURN: Final = 32  # frames that go through without waiting, then others have a turn


class Channel:
    """One stream as frames. At most one task takes frames; sending is safe from several.

    Args:
        max_frame_bytes: what announces more breaks the protocol.
        on_large: asked, before memory is taken, about each frame of more than SMALL_FRAME_BYTES: whether it is
            wanted; else its bytes are dropped as they come. None: all are.
    """

    __slots__ = (
        "_expired",
        "_most",
        "_on_large",
        "_reader",
        "_sending",
        "_sent",
        "_stream",
        "_taking",
        "_turn",
        "_wanted",
        "idle_since",
        "is_broken",
    )

    def __init__(
        self,
        stream: Stream,
        *,
        max_frame_bytes: int,
        on_large: Callable[[int], Awaitable[bool]] | None = None,
    ) -> None:
        self.is_broken = False  # a frame was sent in part, or not at all: nothing may follow it
        self.idle_since = 0.0
        self._stream = stream
        self._reader = FrameReader(
            max_frame_bytes, ask_from=None if on_large is None else min(SMALL_FRAME_BYTES, max_frame_bytes)
        )
        self._on_large = on_large
        # What was read ahead counts no more in the connection's own budget: behind a peer's requests, of which there
        # may be thousands, little of it.
        self._most = READ_BYTES if on_large is None else SMALL_FRAME_BYTES
        self._wanted = self._most
        self._taking = False
        self._expired = False
        self._turn = 0
        self._sending = False
        self._sent = trio.lowlevel.ParkingLot()

    # Sending

    def send_now(self, parts: list[Part]) -> bool:
        """Send one frame if there is room for it and nobody is sending; else nothing. Raises StreamError."""
        if self._sending:
            return False
        if self.is_broken:
            raise StreamError("the stream is broken off")
        return self._stream.send_nowait(parts)

    async def send(self, parts: list[Part]) -> None:
        """Send one frame, after those that others are sending. Raises StreamError.

        Waits for the other side where it has to, and now and then for other tasks of this one.
        """
        if self.send_now(parts):
            await self.take_turn()
            return
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

    async def take_turn(self) -> None:
        """Let other tasks run if this stream's task has not waited for a while; the first time at once."""
        if not self._turn % _TURN:
            await trio.lowlevel.checkpoint()
        self._turn += 1

    # Receiving

    async def take(self) -> Body | None:
        """The next frame, None after a clean end between frames.

        Raises RemoteProtocolError and StreamError. Does not wait when a frame is here.
        """
        reader = self._reader
        body = reader.next()
        if body is not None:
            return body
        self._taking = True
        try:
            while True:
                if reader.asks:
                    await self._ask()
                elif not await self._receive():
                    if reader.is_between_frames:
                        return None
                    raise StreamError("the stream ended in the middle of a frame")
                body = reader.next()
                if body is not None:
                    # After a large frame most likely another one follows: leave its section where it is.
                    self._wanted = _HEAD_BYTES if len(body[1]) > SMALL_FRAME_BYTES else self._most
                    return body
        finally:
            self._taking = False

    async def _receive(self) -> int:
        """Wait for bytes of the next frame; how many came, 0 at the end."""
        buffer = self._reader.buffer()
        if buffer is not None:
            size = await self._stream.receive_into(buffer, len(buffer))
            self._reader.received(size)
            return size
        data = await self._stream.receive_some(self._wanted)
        self._reader.feed(data)
        return len(data)

    def take_nowait(self) -> Body | None:
        """The next frame if it is here. Raises RemoteProtocolError."""
        return self._reader.next()

    def head(self) -> Body | None:
        """The frame that `take` would give at once, if any; None also while another task takes."""
        if self._taking:
            return None
        body = self._reader.head()
        if body is None and self._reader.buffer() is None and not self._reader.asks:
            try:
                data = self._stream.receive_nowait(self._wanted)
            except StreamError:
                return None  # for whoever takes, or sends, to find
            if data:
                self._reader.feed(data)
                body = self._reader.head()
        return body

    async def _ask(self) -> None:
        if self._on_large is None or await self._on_large(self._reader.announced):
            self._reader.admit()
        else:
            self._reader.skip()

    # Its state

    def is_live(self) -> bool:
        """Whether a stream that is between calls may carry another one, as far as can be known."""
        if self.is_broken or self._sending or not self._reader.is_between_frames:
            return False
        try:
            return self._stream.receive_nowait(1) is None  # neither more bytes nor an end
        except StreamError:
            return False

    @property
    def is_expired(self) -> bool:
        """Whether its call's time ran out."""
        return self._expired

    def expire(self) -> None:
        """The time of its call is up: whoever waits for the stream is woken by a StreamError."""
        self._expired = True
        self.reset()

    def reset(self) -> None:
        """Break the stream off."""
        self.is_broken = True
        self._stream.reset()

    async def aclose(self) -> None:
        """End the stream."""
        await self._stream.aclose()


def blame(error: RemoteProtocolError, peer: object) -> RemoteProtocolError:
    """The error, with the peer that it is about."""
    error.peer = peer
    return error
