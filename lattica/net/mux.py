"""One connection's Noise records and Yamux frames as one machine: bytes of the socket on one side, streams on
the other. Opens no socket, starts no task, reads no clock.

`make_mux` gives the machine that connections use, which is native. `ReferenceMux` is the same in Python, to read
and to test against: both give the same events and the same bytes for the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from lattica import _native
from lattica._native import WindowBudget
from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica.net.noise import MAX_PLAINTEXT_BYTES, NoiseSession
from lattica.net.outgoing import Piece
from lattica.net.windows import ReferenceBudget
from lattica.net.yamux import (
    ENDED,
    OPENED,
    PONG,
    READABLE,
    RESET,
    WENT_AWAY,
    WRITABLE,
    Event,
    Yamux,
)

__all__ = [
    "ENDED",
    "OPENED",
    "PONG",
    "READABLE",
    "RESET",
    "WENT_AWAY",
    "WRITABLE",
    "Event",
    "Mux",
    "ReferenceBudget",
    "ReferenceMux",
    "WindowBudget",
    "make_mux",
]


class Mux(Protocol):
    """One side of a secured, multiplexed connection.

    Until `start`, `seal` and `open` carry plain bytes inside the records: the choice of the muxer. Afterwards
    `receive` takes what the socket gives, `take_output` gives what it should send. A stream is known by its id
    from `open_stream` or its OPENED event until both sides have ended it and everything was read, or until it was
    reset; what is asked of a stream that is not known gives nothing, or raises StreamError where it should send.

    `now` is in seconds, of any clock that doesn't go back. Reading goes on after `receive` has raised.
    """

    @property
    def output_bytes(self) -> int:
        """Plaintext that waits to be sealed, its data frames' headers not counted."""

    @property
    def rtt(self) -> float | None:
        """Seconds, smoothed over the pings; None before the first answer."""

    @property
    def gone(self) -> bool:
        """Whether the other side said that it accepts no new streams."""

    @property
    def unread_bytes(self) -> int:
        """What arrived and was not read, of all streams."""

    @property
    def inbound_streams(self) -> int:
        """Streams that the other side opened and that are not over."""

    def seal(self, data: Piece) -> bytes:
        """Records that carry `data`. Raises LocalProtocolError after `start`."""

    def open(self, data: bytes) -> bytes:
        """The plaintext of all records that are whole by now; keeps less than one.

        Raises:
            RemoteProtocolError: a record that the other side did not seal.
            LocalProtocolError: after `start`.
        """

    def start(self, early: bytes) -> list[Event]:
        """From here on it is Yamux, beginning with `early`: plaintext that `open` gave too much."""

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What these bytes of the socket mean: (kind, stream, value), in order.

        OPENED, READABLE (bytes came where none waited unread), ENDED, RESET (value 1: by us, because more than
        MAX_UNREAD_BYTES waited), WRITABLE (a stream whose `send` was short has room again), WENT_AWAY (value:
        code), PONG (value: microseconds). Stream and value are 0 where they mean nothing.

        Raises:
            RemoteProtocolError: the other side broke Noise, Yamux or a limit: close the connection. All frames
                before that have counted, what they brought can be read. Raised again by every further call.
        """

    def open_stream(self) -> int:
        """Open a stream; returns its id. Raises StreamError: the other side went away, or all ids are used."""

    def send(self, stream: int, data: Piece) -> int:
        """Queue as much as window and queue take now; returns how many bytes, possibly 0.

        When it is short, a WRITABLE follows, from `receive` or from `take_output`.

        Raises:
            StreamError: the stream is over or was reset.
            LocalProtocolError: it was ended by `end`.
        """

    def send_all_or_nothing(self, stream: int, parts: Sequence[Piece]) -> bool:
        """Queue all parts, one behind the other, or nothing. No WRITABLE follows. Raises as `send`."""

    def end(self, stream: int) -> None:
        """Say, behind what is queued, that no more comes. Raises as `send`."""

    def reset(self, stream: int) -> None:
        """Break a stream off and forget it; what was queued is dropped. Nothing happens for one that is over."""

    def read(self, stream: int, max_bytes: int) -> bytes:
        """What has arrived, up to `max_bytes`; b"" when nothing is here. The other side gets credit by itself."""

    def read_into(self, stream: int, buffer: bytearray | memoryview) -> int:
        """As `read`, straight into a writable buffer of bytes; returns how many."""

    def available(self, stream: int) -> int:
        """How many bytes `read` would give."""

    def discard(self, stream: int) -> None:
        """Nobody will read this stream any more: what comes is dropped, and beyond the window reset."""

    def ping(self, now: float) -> None:
        """Ask for a PONG; nothing happens while one is asked for."""

    def go_away(self, code: int = 0) -> None:
        """Tell the other side that this connection ends; 0: normally, 1: it broke the protocol."""

    def take_output(self, max_bytes: int) -> tuple[bytes, list[int]]:
        """Records to send, until they are `max_bytes` or more (by less than one record), and the streams whose
        senders have room again, in the order of their ids."""


class ReferenceMux:
    """`Mux` in Python. Each key is 32 bytes."""

    def __init__(
        self, *, initiator: bool, send_key: bytes, receive_key: bytes, windows: ReferenceBudget
    ) -> None:
        self._noise = NoiseSession(send_key=send_key, receive_key=receive_key)
        self._yamux = Yamux(initiator=initiator, windows=windows)
        self._started = False
        self._broken = ""

    @property
    def output_bytes(self) -> int:
        return self._yamux.output_bytes

    @property
    def rtt(self) -> float | None:
        return self._yamux.rtt

    @property
    def gone(self) -> bool:
        return self._yamux.gone

    @property
    def unread_bytes(self) -> int:
        return self._yamux.unread_bytes

    @property
    def inbound_streams(self) -> int:
        return self._yamux.inbound_streams

    def seal(self, data: Piece) -> bytes:
        if self._started:
            raise LocalProtocolError("plain records are for the time before the mux started")
        return self._noise.encrypt([data])

    def open(self, data: bytes) -> bytes:
        if self._started:
            raise LocalProtocolError("plain records are for the time before the mux started")
        return b"".join(self._noise.receive(data))

    def start(self, early: bytes) -> list[Event]:
        if self._started:
            raise LocalProtocolError("the mux was started already")
        self._started = True
        return self._take([early], 0.0)

    def receive(self, data: bytes, now: float) -> list[Event]:
        if not self._started:
            raise LocalProtocolError("the mux was not started")
        return self._take(self._noise.each(data), now)

    def _take(self, plains: Iterable[bytes], now: float) -> list[Event]:
        if self._broken:
            raise RemoteProtocolError(self._broken)
        events: list[Event] = []
        try:
            for plain in plains:
                self._yamux.receive(plain, now, events)
        except RemoteProtocolError as error:
            self._broken = str(error)
            raise
        return events

    def open_stream(self) -> int:
        return self._yamux.open()

    def send(self, stream: int, data: Piece) -> int:
        return self._yamux.send(stream, memoryview(data))

    def send_all_or_nothing(self, stream: int, parts: Sequence[Piece]) -> bool:
        return self._yamux.send_all_or_nothing(stream, parts)

    def end(self, stream: int) -> None:
        self._yamux.end(stream)

    def reset(self, stream: int) -> None:
        self._yamux.reset(stream)

    def read(self, stream: int, max_bytes: int) -> bytes:
        return self._yamux.read(stream, max_bytes)

    def read_into(self, stream: int, buffer: bytearray | memoryview) -> int:
        return self._yamux.read_into(stream, memoryview(buffer))

    def available(self, stream: int) -> int:
        return self._yamux.available(stream)

    def discard(self, stream: int) -> None:
        self._yamux.discard(stream)

    def ping(self, now: float) -> None:
        self._yamux.ping(now)

    def go_away(self, code: int = 0) -> None:
        self._yamux.go_away(code)

    def take_output(self, max_bytes: int) -> tuple[bytes, list[int]]:
        if not self._started:
            raise LocalProtocolError("the mux was not started")
        records: list[bytes] = []
        size = 0
        while size < max_bytes and (pieces := self._yamux.record(MAX_PLAINTEXT_BYTES)):
            records.append(self._noise.encrypt(pieces))
            size += len(records[-1])
        return b"".join(records), self._yamux.take_writable()


def make_mux(*, initiator: bool, send_key: bytes, receive_key: bytes, windows: WindowBudget) -> Mux:
    """The mux of one connection, whose handshake gave these keys, 32 bytes each.

    Args:
        windows: shared by all connections of a node.
    """
    return _native.Mux(initiator=initiator, send_key=send_key, receive_key=receive_key, windows=windows)
