from __future__ import annotations

from collections.abc import Callable

import pytest

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.net import mux as mux_module
from lattica.net import yamux as yamux
from lattica.net.mux import (
    ENDED,
    OPENED,
    PONG,
    READABLE,
    RESET,
    WENT_AWAY,
    WRITABLE,
    Event,
    Mux,
    WindowBudget,
)
from lattica.net.noise import NoiseSession
from lattica.net.windows import INITIAL_WINDOW
from lattica.net.yamux import HEADER

KEYS = bytes([7]) * 32, bytes([8]) * 32
BIG = 1 << 30
MakeMux = Callable[..., Mux]


class Side:
    """A mux, and a socket's worth of bytes towards the other one."""

    def __init__(self, make: MakeMux, *, initiator: bool, windows: WindowBudget | None = None) -> None:
        send_key, receive_key = KEYS if initiator else KEYS[::-1]
        self.mux = make(
            initiator=initiator,
            send_key=send_key,
            receive_key=receive_key,
            windows=windows or WindowBudget(1 << 40),
        )
        self.mux.start(b"")
        self.writable: list[int] = []

    def output(self, max_bytes: int = BIG) -> bytes:
        data, writable = self.mux.take_output(max_bytes)
        self.writable += writable
        return data

    def move(self, target: Side, now: float = 0.0) -> list[Event]:
        return target.mux.receive(self.output(), now)


@pytest.fixture(params=["ReferenceMux"])
def make(request: pytest.FixtureRequest) -> MakeMux:
    return getattr(mux_module, request.param)  # type: ignore[no-any-return]


@pytest.fixture
def one(make: MakeMux) -> Side:
    return Side(make, initiator=True)


@pytest.fixture
def two(make: MakeMux) -> Side:
    return Side(make, initiator=False)


class Peer:
    """The other side by hand: any frames at all, well sealed."""

    def __init__(self, mux: Mux) -> None:
        self.noise = NoiseSession(send_key=KEYS[0], receive_key=KEYS[1])  # the initiator's
        self.mux = mux

    def say(self, *frames: bytes, now: float = 0.0) -> list[Event]:
        return self.mux.receive(self.noise.encrypt(frames), now)

    def heard(self) -> list[tuple[int, ...]]:
        """Headers of all frames that the mux sends now; payloads left out."""
        plain = b"".join(self.noise.receive(self.mux.take_output(BIG)[0]))
        headers, at = [], 0
        while at < len(plain):
            headers.append(HEADER.unpack_from(plain, at)[1:])
            at += HEADER.size + (headers[-1][3] if headers[-1][0] == yamux.DATA else 0)
        return headers


def frame(kind: int, flags: int, stream: int, length: int) -> bytes:
    return HEADER.pack(0, kind, flags, stream, length)


def opened(one: Side, two: Side) -> int:
    stream = one.mux.open_stream()
    assert one.move(two) == [(OPENED, stream, 0)]
    assert two.move(one) == []
    return stream


def send_all(side: Side, stream: int, data: bytes) -> int:
    return side.mux.send(stream, data)


def test_bytes_arrive_in_order_and_the_end_after_them(one: Side, two: Side) -> None:
    stream = one.mux.open_stream()
    assert one.mux.send(stream, b"hello ") == 6
    assert one.mux.send_all_or_nothing(stream, [b"wor", bytearray(b"l"), memoryview(b"d")])
    one.mux.end(stream)
    assert one.move(two) == [(OPENED, stream, 0), (READABLE, stream, 0), (ENDED, stream, 0)]
    assert two.mux.available(stream) == two.mux.unread_bytes == 11
    assert two.mux.read(stream, 4) == b"hell"
    buffer = bytearray(3)
    assert two.mux.read_into(stream, buffer) == 3
    assert buffer == b"o w"
    assert two.mux.read(stream, 100) == b"orld"
    assert two.mux.read(stream, 100) == b""


def test_readable_comes_once_until_all_was_read(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.send(stream, b"ab")
    assert one.move(two) == [(READABLE, stream, 0)]
    two.mux.read(stream, 1)
    one.mux.send(stream, b"c")
    assert one.move(two) == []
    assert two.mux.read(stream, 9) == b"bc"
    one.mux.send(stream, b"d")
    assert one.move(two) == [(READABLE, stream, 0)]


def test_the_other_direction_stays_open_after_an_end(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.end(stream)
    assert one.move(two) == [(ENDED, stream, 0)]
    two.mux.send(stream, b"answer")
    two.mux.end(stream)
    assert two.move(one) == [(READABLE, stream, 0), (ENDED, stream, 0)]
    assert one.mux.read(stream, 99) == b"answer"
    with pytest.raises(StreamError):
        one.mux.send(stream, b"x")


def test_a_writer_gets_no_further_than_the_window_until_the_reader_reads(one: Side, two: Side) -> None:
    stream = opened(one, two)
    assert one.mux.send(stream, bytes(2 * INITIAL_WINDOW)) == INITIAL_WINDOW
    one.move(two)
    assert one.writable == []
    assert two.mux.output_bytes == 0
    assert len(two.mux.read(stream, BIG)) == INITIAL_WINDOW
    assert two.move(one) == [(WRITABLE, stream, 0)]
    assert one.mux.send(stream, bytes(INITIAL_WINDOW)) == INITIAL_WINDOW


def test_a_reset_stream_is_forgotten_on_both_sides(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.send(stream, b"lost")
    one.mux.reset(stream)
    assert one.move(two) == [(RESET, stream, 0)]
    for side in one, two:
        with pytest.raises(StreamError):
            side.mux.send(stream, b"x")
        assert side.mux.output_bytes == 0


def test_sending_after_the_end_is_our_own_fault(one: Side) -> None:
    stream = one.mux.open_stream()
    one.mux.end(stream)
    with pytest.raises(LocalProtocolError):
        one.mux.send(stream, b"x")


def test_a_pong_tells_the_round_trip(one: Side, two: Side) -> None:
    one.mux.ping(10.0)
    one.mux.ping(10.1)  # one is outstanding
    assert one.move(two, 10.0) == []
    assert two.move(one, 10.25) == [(PONG, 0, 250_000)]
    assert one.mux.rtt == 0.25


def test_no_stream_is_opened_to_a_peer_that_went_away(one: Side, two: Side) -> None:
    stream = opened(one, two)
    two.mux.go_away(1)
    assert two.move(one) == [(WENT_AWAY, 0, 1)]
    assert one.mux.gone
    with pytest.raises(StreamError):
        one.mux.open_stream()
    assert one.mux.send(stream, b"still") == 5


def test_what_came_before_a_broken_frame_can_be_read(two: Side) -> None:
    peer = Peer(two.mux)
    with pytest.raises(RemoteProtocolError):
        peer.say(frame(yamux.DATA, yamux.SYN, 1, 4), b"last", frame(9, 0, 0, 0))
    assert two.mux.read(1, 9) == b"last"
    with pytest.raises(RemoteProtocolError):
        two.mux.receive(b"", 0.0)
