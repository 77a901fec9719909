"""/yamux/1.0.0 as a state machine: frames in, events out. No sockets, no tasks, no clock.

What is delivered is bounded by what was granted: a peer that sends more than a stream's window is cut off,
and so is one that makes us hold more than MAX_BUFFERED_BYTES. A reader that pauses is never a reason to reset
its writer: the window runs out and the writer waits.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md and libp2p's specs/yamux.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError

PROTOCOL = "/yamux/1.0.0"
HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

KIB: Final = 1024
INITIAL_WINDOW: Final = 256 * KIB  # the protocol's own; both sides start with it
MAX_WINDOW: Final = 4 * KIB * KIB  # 80 MB/s over 50 ms; a stream that is read promptly grows to it
EXTRA_WINDOWS: Final = 64 * KIB * KIB  # all growth of one connection's windows together
MAX_BUFFERED_BYTES: Final = 256 * KIB * KIB  # unread data of one connection; beyond it the peer is cut off
MAX_INBOUND_STREAMS: Final = 4096  # as many as a peer may have calls in flight; more are reset
MAX_LINGERING: Final = 256  # streams that we closed and the other side did not; the oldest is reset
MAX_DATA_BYTES: Final = 65_519 - HEADER.size  # header and payload fill one noise record
MAX_REPLY_BYTES: Final = KIB * KIB  # pongs and resets that a peer makes us queue without reading them


@dataclass(frozen=True, slots=True)
class Opened:
    """The other side opened a stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes of a stream. Say `consume` when the reader has taken them."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The other side will send no more on a stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class WasReset:
    """The other side broke a stream off; we forget it."""

    stream: int


@dataclass(frozen=True, slots=True)
class Writable:
    """A stream's window opened."""

    stream: int


@dataclass(frozen=True, slots=True)
class WentAway:
    """The other side accepts no new streams; code 0 is a normal end."""

    code: int


Event = Opened | Received | Ended | WasReset | Writable | WentAway


@dataclass(slots=True)
class _Stream:
    send_window: int = INITIAL_WINDOW
    receive_window: int = INITIAL_WINDOW  # what the other side may still send
    window: int = INITIAL_WINDOW  # what receive_window and unread bytes add up to after a credit
    unread: int = 0
    drained: bool = True  # since the last credit the reader once had nothing to read
    ended_here: bool = False
    ended_there: bool = False
    unwanted: bool = False  # nobody reads any more: what arrives is dropped


class Yamux:
    """One side of a multiplexed connection.

    `receive` takes plaintext and gives events; every other method queues frames for `take_output`.
    """

    def __init__(self, *, initiator: bool) -> None:
        self.gone = False  # the other side went away: no new streams
        self._streams: dict[int, _Stream] = {}
        self._lingering: OrderedDict[int, None] = OrderedDict()
        self._next_id = 1 if initiator else 2
        self._inbound = 0
        self._unread = 0
        self._extra = 0
        self._output: list[bytes] = []
        self.output_bytes = 0
        self._reply_bytes = 0
        self._header = b""
        self._payload_stream = 0
        self._payload_left = 0
        self._payload_flags = 0

    # Output

    def take_output(self) -> list[bytes]:
        """All frames that wait to be sent, in order; the queue is empty afterwards."""
        output, self._output, self.output_bytes, self._reply_bytes = self._output, [], 0, 0
        return output

    def _queue(self, kind: int, flags: int, stream: int, length: int, data: bytes = b"") -> None:
        self._output.append(HEADER.pack(0, kind, flags, stream, length))
        if data:
            self._output.append(data)
        self.output_bytes += HEADER.size + len(data)

    def _reply(self, kind: int, flags: int, stream: int, length: int) -> None:
        """Queue a frame that the other side made us send, without a stream whose number bounds it."""
        self._queue(kind, flags, stream, length)
        self._reply_bytes += HEADER.size
        if self._reply_bytes > MAX_REPLY_BYTES:
            raise RemoteProtocolError("the peer sends without reading the replies")

    # What we do

    def open(self) -> int:
        """Open a stream; returns its id.

        Raises:
            StreamError: the other side went away, or all 2^31 ids are used up.
        """
        if self.gone:
            raise StreamError("the peer accepts no new streams on this connection")
        stream = self._next_id
        if stream >= 1 << 32:
            raise StreamError("this connection has used up its stream ids; connect again")
        self._next_id += 2
        self._streams[stream] = _Stream()
        self._queue(WINDOW_UPDATE, SYN, stream, 0)
        return stream

    def send(self, stream: int, data: memoryview) -> int:
        """Queue as much of `data` as the window and one frame allow; returns how many bytes, possibly 0."""
        state = self._writable(stream)
        size = min(len(data), state.send_window, MAX_DATA_BYTES)
        if size:
            state.send_window -= size
            self._queue(DATA, 0, stream, size, bytes(data[:size]))
        return size

    def end(self, stream: int) -> None:
        """Say that we send no more on a stream."""
        state = self._writable(stream)
        state.ended_here = True
        self._queue(WINDOW_UPDATE, FIN, stream, 0)
        self._forget_if_over(stream, state)

    def consume(self, stream: int, size: int) -> None:
        """The reader took `size` bytes: grants new credit once half the window is used."""
        state = self._streams.get(stream)
        if state is None:
            return
        self._unread -= size
        state.unread -= size
        state.drained |= state.unread == 0
        if state.ended_there:
            self._forget_if_over(stream, state)
            return
        credit = state.window - state.receive_window - state.unread
        if credit * 2 < state.window:
            return
        growth = min(state.window, MAX_WINDOW - state.window, EXTRA_WINDOWS - self._extra)
        if state.drained and growth > 0:  # the reader waits for the writer: the window may hold it up
            state.window += growth
            self._extra += growth
            credit += growth
        state.drained = False
        state.receive_window += credit
        self._queue(WINDOW_UPDATE, 0, stream, credit)

    def discard(self, stream: int) -> None:
        """Nobody will read this stream any more: what still comes is dropped, and beyond the window reset."""
        state = self._streams.get(stream)
        if state is None or state.unwanted:
            return
        state.unwanted = True
        self._unread -= state.unread
        state.unread = 0
        if not self._forget_if_over(stream, state):
            self._lingering[stream] = None
            if len(self._lingering) > MAX_LINGERING:
                self.reset(next(iter(self._lingering)))

    def reset(self, stream: int) -> None:
        """Break a stream off and forget it. Nothing happens for one that is over."""
        if stream in self._streams:
            self._forget(stream)
            self._queue(WINDOW_UPDATE, RST, stream, 0)

    def go_away(self) -> None:
        """Tell the other side that this connection ends now, normally."""
        self._queue(GO_AWAY, 0, 0, 0)

    def _writable(self, stream: int) -> _Stream:
        state = self._streams.get(stream)
        if state is None:
            raise StreamError("the stream is closed")
        if state.ended_here:
            raise LocalProtocolError("the stream was ended by this side: nothing can be sent any more")
        return state

    # What the other side does

    def receive(self, data: bytes) -> list[Event]:
        """Take plaintext that arrived; returns what it means.

        Raises:
            RemoteProtocolError: the other side broke the protocol or a limit; the connection must be closed.
        """
        events: list[Event] = []
        at, end = 0, len(data)
        while at < end:
            if self._payload_left:
                size = min(self._payload_left, end - at)
                self._payload_left -= size
                self._deliver(data[at : at + size] if size < end else data, events)
                at += size
                continue
            if not self._header and end - at >= HEADER.size:
                self._frame(HEADER.unpack_from(data, at), events)
                at += HEADER.size
                continue
            need = HEADER.size - len(self._header)
            self._header += data[at : at + need]
            at += need
            if len(self._header) == HEADER.size:
                header, self._header = self._header, b""
                self._frame(HEADER.unpack(header), events)
        return events

    def _frame(self, header: tuple[int, ...], events: list[Event]) -> None:
        version, kind, flags, stream, length = header
        if version != 0 or kind > GO_AWAY or flags > 15:
            raise RemoteProtocolError(f"not a yamux frame: version {version}, type {kind}, flags {flags}")
        if kind == PING:
            if flags & SYN:
                self._reply(PING, ACK, 0, length)
            return
        if kind == GO_AWAY:
            self.gone = True
            events.append(WentAway(length))
            return
        if stream == 0:
            raise RemoteProtocolError("a yamux frame for stream 0, which is the connection's own")
        if flags & SYN:
            self._opened(stream, events)
        state = self._streams.get(stream)
        if kind == DATA:
            if state is not None and length > state.receive_window:
                raise RemoteProtocolError(
                    f"{length} bytes on a yamux stream whose window has {state.receive_window} left"
                )
            if state is None and length > MAX_WINDOW:  # of a stream that we have forgotten
                raise RemoteProtocolError(f"a yamux frame of {length} bytes, more than any window")
            if state is not None:
                state.receive_window -= length
            if length:
                self._payload_stream, self._payload_left, self._payload_flags = stream, length, flags
                return
        elif state is not None and length:
            state.send_window += length
            if state.send_window >= 1 << 32:
                raise RemoteProtocolError("a yamux window of more than 2^32 bytes")
            events.append(Writable(stream))
        self._finish(stream, flags, events)

    def _opened(self, stream: int, events: list[Event]) -> None:
        if stream % 2 == self._next_id % 2:
            raise RemoteProtocolError(f"the peer opened yamux stream {stream}, whose parity is ours")
        if stream in self._streams:
            raise RemoteProtocolError(f"the peer opened yamux stream {stream} twice")
        if self._inbound >= MAX_INBOUND_STREAMS:
            self._reply(WINDOW_UPDATE, RST, stream, 0)
            return
        self._inbound += 1
        self._streams[stream] = _Stream()
        self._reply(WINDOW_UPDATE, ACK, stream, 0)
        events.append(Opened(stream))

    def _deliver(self, data: bytes, events: list[Event]) -> None:
        stream = self._payload_stream
        state = self._streams.get(stream)
        if state is not None and state.unwanted:
            if state.receive_window == 0 and not self._payload_left:
                self.reset(stream)  # it waits for credit that never comes
        elif state is not None:
            state.unread += len(data)
            self._unread += len(data)
            if self._unread > MAX_BUFFERED_BYTES:
                raise RemoteProtocolError(f"more than {MAX_BUFFERED_BYTES} unread bytes on one connection")
            events.append(Received(stream, data))
        if not self._payload_left:
            self._finish(stream, self._payload_flags, events)

    def _finish(self, stream: int, flags: int, events: list[Event]) -> None:
        """FIN and RST count after the frame's own payload."""
        state = self._streams.get(stream)
        if state is None:
            return
        if flags & RST:
            self._forget(stream)
            events.append(WasReset(stream))
        elif flags & FIN and not state.ended_there:
            state.ended_there = True
            events.append(Ended(stream))
            self._forget_if_over(stream, state)

    def _forget_if_over(self, stream: int, state: _Stream) -> bool:
        over = state.ended_here and state.ended_there and not state.unread
        if over:
            self._forget(stream)
        return over

    def _forget(self, stream: int) -> None:
        state = self._streams.pop(stream)
        self._lingering.pop(stream, None)
        self._unread -= state.unread
        self._extra -= state.window - INITIAL_WINDOW
        if stream % 2 != self._next_id % 2:
            self._inbound -= 1
