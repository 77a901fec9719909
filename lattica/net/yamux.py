"""/yamux/1.0.0 as a state machine: plaintext in, events out; bytes of streams in, frames out. No sockets, no clock.

The reference for the native one. Both keep what arrived until it is read and what waits to be sent until it is
taken, so that a reader's pause stops its writer by the window and never by a reset.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md and libp2p's specs/yamux.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.net.outgoing import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Outgoing,
    Piece,
    StreamState,
)
from lattica.net.windows import (
    EXTRA_WINDOWS,
    INITIAL_WINDOW,
    KIB,
    MAX_WINDOW,
    ReceiveWindow,
    ReferenceBudget,
)

PROTOCOL = "/yamux/1.0.0"

OPENED: Final = 0  # the other side opened a stream
READABLE: Final = 1  # bytes came where none waited
ENDED: Final = 2  # the other side sends no more
RESET: Final = 3  # a stream broke off and is forgotten: value 0 by the other side, 1 by us over UNREAD_BYTES
WRITABLE: Final = 4  # room again for a sender that got less than it asked for
WENT_AWAY: Final = 5  # the other side accepts no new streams; value: its code, 0 for a normal end
PONG: Final = 6  # value: microseconds
Event = tuple[int, int, int]  # kind, stream, value

MAX_INBOUND_STREAMS: Final = 4096 + 1024  # as many calls in flight as a peer may have, and its streams
MAX_LINGERING: Final = 4096  # streams that we closed and the other side did not; the oldest is reset
MAX_UNREAD_BYTES: Final = 64 * KIB * KIB  # of one connection; beyond it the fullest stream is reset


class Yamux:
    """One side of a multiplexed connection. See `lattica.net.mux.Mux`, whose part behind the records this is."""

    def __init__(self, *, initiator: bool, windows: ReferenceBudget) -> None:
        self.gone = False  # the other side went away: no new streams
        self.rtt: float | None = None
        self.unread_bytes = 0
        self.inbound_streams = 0
        self.output = Outgoing()
        self._windows = windows
        self._extra = 0
        self._now = 0.0
        self._least_rtt: float | None = None
        self._streams: dict[int, StreamState] = {}
        self._lingering: OrderedDict[int, None] = OrderedDict()
        self._next_id = 1 if initiator else 2
        self._header = b""
        self._payload_stream = 0
        self._payload_left = 0
        self._payload_flags = 0
        self._ping = 0
        self._pinged_at: float | None = None

    def __del__(self) -> None:
        self._windows.give_back(self._extra)

    # What we do

    def open(self) -> int:
        if self.gone:
            raise StreamError("the peer accepts no new streams on this connection")
        stream = self._next_id
        if stream >= 1 << 32:
            raise StreamError("this connection has used up its stream ids; connect again")
        self._next_id += 2
        self._streams[stream] = StreamState(ReceiveWindow(self._now))
        self.output.control(WINDOW_UPDATE, SYN, stream, 0)
        return stream

    def send(self, stream: int, data: memoryview) -> int:
        state = self._writable(stream)
        size = min(len(data), self.output.room(state))
        if size:
            self.output.payload(stream, state, data[:size])
        state.blocked = size < len(data)
        return size

    def send_all_or_nothing(self, stream: int, parts: Sequence[Piece]) -> bool:
        state = self._writable(stream)
        if sum(map(len, parts)) > self.output.room(state):
            return False
        for part in parts:
            if part:
                self.output.payload(stream, state, part)
        return True

    def end(self, stream: int) -> None:
        self.output.end(stream, self._writable(stream))

    def reset(self, stream: int) -> None:
        if stream in self._streams:
            self._forget(stream)
            self.output.control(WINDOW_UPDATE, RST, stream, 0)

    def read(self, stream: int, max_bytes: int) -> bytes:
        state = self._streams.get(stream)
        if state is None or not state.unread:
            return b""
        with memoryview(state.unread) as view:
            data = bytes(view[:max_bytes])
        self._took(stream, state, len(data))
        return data

    def read_into(self, stream: int, buffer: memoryview) -> int:
        state = self._streams.get(stream)
        if state is None:
            return 0
        size = min(len(buffer), len(state.unread))
        with memoryview(state.unread) as view:
            buffer[:size] = view[:size]
        self._took(stream, state, size)
        return size

    def available(self, stream: int) -> int:
        state = self._streams.get(stream)
        return 0 if state is None else len(state.unread)

    def discard(self, stream: int) -> None:
        state = self._streams.get(stream)
        if state is None or state.unwanted:
            return
        state.unwanted = True
        self.unread_bytes -= len(state.unread)
        state.unread = bytearray()
        self._linger_or_forget(stream, state)

    def ping(self, now: float) -> None:
        if self._pinged_at is None:
            self._ping = (self._ping + 1) % (1 << 32)
            self._pinged_at = now
            self.output.control(PING, SYN, 0, self._ping)

    def go_away(self, code: int) -> None:
        self.output.control(GO_AWAY, 0, 0, code)

    def _writable(self, stream: int) -> StreamState:
        state = self._streams.get(stream)
        if state is None:
            raise StreamError("the stream is closed")
        if state.ending:
            raise LocalProtocolError("the stream was ended by this side: nothing can be sent any more")
        return state

    def _took(self, stream: int, state: StreamState, size: int) -> None:
        if not size:
            return
        del state.unread[:size]
        self.unread_bytes -= size
        if state.ended_there:
            self._linger_or_forget(stream, state)
        elif credit := state.window.credit(len(state.unread)):
            self.output.credit(stream, state, credit)

    # Output

    @property
    def output_bytes(self) -> int:
        return self.output.bytes

    def record(self, room: int) -> list[Piece]:
        return self.output.record(room, self._streams, self._linger_or_forget)

    def take_writable(self) -> list[int]:
        return self.output.take_writable(self._streams)

    # What the other side does

    def receive(self, data: bytes, now: float, events: list[Event]) -> None:
        """Take plaintext that arrived and append what it means to `events`.

        Raises:
            RemoteProtocolError: the other side broke the protocol; every whole frame before that has counted.
        """
        self._now = now
        at, end = 0, len(data)
        while at < end:
            if self._payload_left:
                size = min(self._payload_left, end - at)
                self._payload_left -= size
                self._deliver(data[at : at + size], events)
                at += size
                continue
            need = HEADER.size - len(self._header)
            self._header += data[at : at + need]
            at += need
            if len(self._header) == HEADER.size:
                header, self._header = self._header, b""
                self._frame(HEADER.unpack(header), events)

    def _frame(self, header: tuple[int, ...], events: list[Event]) -> None:
        version, kind, flags, stream, length = header
        if version != 0 or kind > GO_AWAY or flags > 15:
            raise RemoteProtocolError(f"not a yamux frame: version {version}, type {kind}, flags {flags}")
        if kind == PING:
            self._pinged(flags, length, events)
            return
        if kind == GO_AWAY:
            self.gone = True
            events.append((WENT_AWAY, 0, length))
            return
        if stream == 0:
            raise RemoteProtocolError("a yamux frame for stream 0, which is the connection's own")
        if flags & SYN:
            self._opened(stream, events)
        state = self._streams.get(stream)
        if kind == DATA:
            self._announce(stream, state, length)
            if length:
                self._payload_stream, self._payload_left, self._payload_flags = stream, length, flags
                return
        elif state is not None and length:
            if state.send_window + length >= 1 << 32:
                raise RemoteProtocolError("a yamux window of more than 2^32 bytes")
            state.send_window += length
            if self.output.unblock(state):
                events.append((WRITABLE, stream, 0))
        self._finish(stream, flags, events)

    def _pinged(self, flags: int, value: int, events: list[Event]) -> None:
        if flags & SYN:
            self.output.reply(PING, ACK, 0, value)
        elif flags & ACK and self._pinged_at is not None and value == self._ping:
            took = max(0.0, self._now - self._pinged_at)
            self._pinged_at = None
            self.rtt = took if self.rtt is None else 0.875 * self.rtt + 0.125 * took  # as TCP smooths it
            self._least_rtt = took if self._least_rtt is None else min(took, self._least_rtt)
            events.append((PONG, 0, int(took * 1e6)))

    def _opened(self, stream: int, events: list[Event]) -> None:
        if stream % 2 == self._next_id % 2:
            raise RemoteProtocolError(f"the peer opened yamux stream {stream}, whose parity is ours")
        if stream in self._streams:
            raise RemoteProtocolError(f"the peer opened yamux stream {stream} twice")
        if self.inbound_streams >= MAX_INBOUND_STREAMS:
            self.output.reply(WINDOW_UPDATE, RST, stream, 0)
            return
        self.output.reply(WINDOW_UPDATE, ACK, stream, 0)
        self.inbound_streams += 1
        self._streams[stream] = StreamState(ReceiveWindow(self._now))
        events.append((OPENED, stream, 0))

    def _announce(self, stream: int, state: StreamState | None, length: int) -> None:
        """A frame of `length` bytes follows."""
        if state is None:
            if length > MAX_WINDOW:  # of a stream that we have forgotten
                raise RemoteProtocolError(f"a yamux frame of {length} bytes, more than any window")
            return
        window = state.window
        if state.ended_there and length:
            raise RemoteProtocolError(f"{length} bytes on a yamux stream that the peer had ended")
        if length > window.left:
            raise RemoteProtocolError(f"{length} bytes on a yamux stream whose window has {window.left} left")
        window.left -= length
        if length and window.wants_growth(self._now, self._least_rtt):
            growth = self._windows.take(
                min(window.size, MAX_WINDOW - window.size, EXTRA_WINDOWS - self._extra)
            )
            if growth:
                self._extra += growth
                window.grow(growth)
                self.output.credit(stream, state, growth)

    def _deliver(self, data: bytes, events: list[Event]) -> None:
        stream = self._payload_stream
        state = self._streams.get(stream)
        if state is not None and state.unwanted:
            if state.window.left == 0 and not self._payload_left:
                self.reset(stream)  # it waits for credit that never comes
        elif state is not None:
            if not state.unread:
                events.append((READABLE, stream, 0))
            state.unread += data
            self.unread_bytes += len(data)
            if self.unread_bytes > MAX_UNREAD_BYTES:
                self._reset_fullest(events)
        if not self._payload_left:
            self._finish(stream, self._payload_flags, events)

    def _reset_fullest(self, events: list[Event]) -> None:
        """The connection lives, and its other streams; whoever wrote to this one sees that it broke."""
        stream = max(self._streams, key=lambda stream: (len(self._streams[stream].unread), -stream))
        self._forget(stream)
        self.output.reply(WINDOW_UPDATE, RST, stream, 0)
        events.append((RESET, stream, 1))

    def _finish(self, stream: int, flags: int, events: list[Event]) -> None:
        """FIN and RST count after the frame's own payload."""
        state = self._streams.get(stream)
        if state is None:
            return
        if flags & RST:
            self._forget(stream)
            events.append((RESET, stream, 0))
        elif flags & FIN and not state.ended_there:
            state.ended_there = True
            events.append((ENDED, stream, 0))
            self._linger_or_forget(stream, state)

    # The end of streams

    def _linger_or_forget(self, stream: int, state: StreamState) -> None:
        if not state.ended_here:
            return
        if state.ended_there and not state.unread:
            self._forget(stream)
        elif state.unwanted and stream not in self._lingering:
            self._lingering[stream] = None
            if len(self._lingering) > MAX_LINGERING:
                self.reset(next(iter(self._lingering)))

    def _forget(self, stream: int) -> None:
        state = self._streams.pop(stream)
        self._lingering.pop(stream, None)
        self.unread_bytes -= len(state.unread)
        self.output.forget(state)
        growth = state.window.size - INITIAL_WINDOW
        self._extra -= growth
        self._windows.give_back(growth)
        if stream % 2 != self._next_id % 2:
            self.inbound_streams -= 1
