"""What waits to be sent on one connection, and whose turn it is.

Control frames first, then streams that have little to send, then one frame of each other stream after the other. The
reference for the native one. No sockets, no clock.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from lattica.errors import RemoteProtocolError
from lattica.net.windows import INITIAL_WINDOW, KIB, ReceiveWindow

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

MAX_REPLY_BYTES: Final = KIB * KIB  # pongs and resets that a peer makes us queue without reading them
MAX_DATA_BYTES: Final = 65_519 - HEADER.size  # header and payload fill one noise record
SHORT_BYTES: Final = 16 * KIB  # a stream that has no more to send does not wait behind bulk
OVERTAKING_BYTES: Final = 64 * KIB  # what such streams may send in a row while others wait
MIN_CUT_BYTES: Final = 4 * KIB  # a frame is not cut smaller than this to fill up a record
QUEUE_BYTES: Final = 256 * KIB  # of one stream, waiting to be sent
CROWDED_BYTES: Final = 4 * KIB * KIB  # when more waits on the connection, a stream may queue its share of it,
CROWDED_QUEUE_BYTES: Final = 16 * KIB  # and this at least

Piece = bytes | bytearray | memoryview


@dataclass(slots=True)
class StreamState:
    """One stream, as its connection's machine keeps it."""

    window: ReceiveWindow
    send_window: int = INITIAL_WINDOW
    unread: bytearray = field(default_factory=bytearray)
    queued: bytearray = field(default_factory=bytearray)
    credit: int = 0  # granted, in a window update that waits to be sent
    waiting: bool = False  # for its turn to send
    blocked: bool = False  # a sender got less than it asked for
    ending: bool = False  # by this side, once `queued` has left
    ended_here: bool = False
    ended_there: bool = False
    unwanted: bool = False  # nobody reads any more: what arrives is dropped


class Outgoing:
    """Frames and payloads that wait. `bytes` counts both without the headers of data frames, `queued` payloads only."""

    def __init__(self) -> None:
        self.bytes = 0
        self.queued = 0
        # A frame, or b"" and a stream to credit; whether it is a reply.
        self._control: deque[tuple[bytes, int, bool]] = deque()
        self._replies = 0  # of the control frames
        self._turns: deque[int] = deque()  # streams that wait to send; those that were forgotten are skipped
        self._short: deque[int] = deque()  # those of them that had little to send when they came
        self._overtook = 0  # what these sent since one of the others did
        self._senders = 0
        self._served: set[int] = set()  # streams that sent since the last take_writable

    # Queueing

    def control(self, kind: int, flags: int, stream: int, length: int) -> None:
        """Queue a frame without payload."""
        self._put(HEADER.pack(0, kind, flags, stream, length), is_reply=False)

    def reply(self, kind: int, flags: int, stream: int, length: int) -> None:
        """Queue a frame that the other side made us send. RemoteProtocolError when it reads none of them."""
        if self._replies * HEADER.size >= MAX_REPLY_BYTES:
            raise RemoteProtocolError("the peer sends without reading the replies")
        self._replies += 1
        self._put(HEADER.pack(0, kind, flags, stream, length), is_reply=True)

    def _put(self, frame: bytes, *, is_reply: bool) -> None:
        self._control.append((frame, 0, is_reply))
        self.bytes += HEADER.size

    def credit(self, stream: int, state: StreamState, credit: int) -> None:
        """Queue a window update. One at a time waits for each stream, so a peer that doesn't read can't pile them up.

        A peer that uses credit which it was not told yet could let it add up beyond what a frame says.
        """
        if not state.credit:
            self._control.append((b"", stream, False))
            self.bytes += HEADER.size
        state.credit = min(state.credit + credit, 0xFFFFFFFF)

    def payload(self, stream: int, state: StreamState, data: Piece) -> None:
        """Queue what `room` has been found for."""
        state.queued += data
        state.send_window -= len(data)
        self.queued += len(data)
        self.bytes += len(data)
        self._wait_for_turn(stream, state)

    def end(self, stream: int, state: StreamState) -> None:
        """Queue a stream's FIN, behind its payload."""
        state.ending = True
        state.blocked = False
        self.bytes += HEADER.size
        self._wait_for_turn(stream, state)

    def forget(self, state: StreamState) -> None:
        """Drop what waits for a stream."""
        self.queued -= len(state.queued)
        self._senders -= state.waiting
        frames = (state.ending and not state.ended_here) + (state.credit > 0)
        self.bytes -= len(state.queued) + HEADER.size * frames

    def room(self, state: StreamState) -> int:
        """How many bytes of payload a stream may queue now."""
        return min(state.send_window, max(0, self._queue_limit() - len(state.queued)))

    def _queue_limit(self) -> int:
        if self.queued <= CROWDED_BYTES:
            return QUEUE_BYTES
        return min(QUEUE_BYTES, max(CROWDED_QUEUE_BYTES, CROWDED_BYTES // max(1, self._senders)))

    def _wait_for_turn(self, stream: int, state: StreamState) -> None:
        if not state.waiting:
            state.waiting = True
            self._senders += 1
            (self._short if len(state.queued) <= SHORT_BYTES else self._turns).append(stream)

    def _next_turns(self) -> deque[int]:
        """The queue whose first stream may send now."""
        short_first = not self._turns or self._overtook < OVERTAKING_BYTES
        return self._short if self._short and short_first else self._turns

    # Taking

    def record(
        self, room: int, streams: Mapping[int, StreamState], ended: Callable[[int, StreamState], None]
    ) -> list[Piece]:
        """Whole frames of at most `room` bytes together, taken from the queues; none when nothing waits.

        `ended` is called with each stream whose FIN is among them; it may forget the stream.
        """
        pieces: list[Piece] = []
        while self._control and room >= HEADER.size:
            frame, credited, is_reply = self._control.popleft()
            self._replies -= is_reply
            if not frame:
                state = streams.get(credited)
                if state is None or not state.credit:
                    continue
                frame = HEADER.pack(0, WINDOW_UPDATE, 0, credited, state.credit)
                state.credit = 0
            pieces.append(frame)
            room -= HEADER.size
            self.bytes -= HEADER.size
        while (turns := self._next_turns()) and room >= HEADER.size:
            stream = turns[0]
            state = streams.get(stream)
            if state is None or not state.waiting:
                turns.popleft()
                continue
            if turns is self._short and len(state.queued) > SHORT_BYTES:
                self._turns.append(turns.popleft())  # it has more to send by now
                continue
            size = min(len(state.queued), MAX_DATA_BYTES)
            if size:
                fits = room - HEADER.size
                if fits < min(size, MIN_CUT_BYTES):
                    break
                size = min(size, fits)
                room -= HEADER.size + size
                pieces += (HEADER.pack(0, DATA, 0, stream, size), bytes(state.queued[:size]))
                del state.queued[:size]
                self.queued -= size
                self.bytes -= size
                self._served.add(stream)
            turns.popleft()
            if turns is self._turns:
                self._overtook = 0
            elif self._turns:
                self._overtook += HEADER.size + size
            state.waiting = False
            self._senders -= 1
            if state.ending and not state.queued and room >= HEADER.size:
                pieces.append(HEADER.pack(0, WINDOW_UPDATE, FIN, stream, 0))
                room -= HEADER.size
                self.bytes -= HEADER.size
                state.ended_here = True
                ended(stream, state)
            elif state.queued or state.ending:
                self._wait_for_turn(stream, state)
        return pieces

    def take_writable(self, streams: Mapping[int, StreamState]) -> list[int]:
        """Streams whose senders have room again since the last call, in the order of their ids."""
        served, self._served = sorted(self._served), set()
        return [stream for stream in served if stream in streams and self.unblock(streams[stream])]

    def unblock(self, state: StreamState) -> bool:
        """Whether a refused sender should try again: when it pays, and the link never waits for it.

        Alone that is when half its queue is free; while others have plenty to send, when all of it is.
        """
        enough = 0 if self.queued > CROWDED_BYTES else QUEUE_BYTES // 2
        again = state.blocked and state.send_window > 0 and len(state.queued) <= enough
        state.blocked &= not again
        return again
