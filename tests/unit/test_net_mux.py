from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lattica import _native
from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.net import outgoing, yamux
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
    ReferenceBudget,
    ReferenceMux,
    WindowBudget,
)
from lattica.net.noise import NoiseSession
from lattica.net.windows import EASY_WINDOW, EXTRA_WINDOWS, INITIAL_WINDOW, MAX_WINDOW
from lattica.net.yamux import HEADER

KEYS = bytes([7]) * 32, bytes([8]) * 32
BIG = 1 << 30
MUCH = memoryview(bytes(MAX_WINDOW))


@dataclass(frozen=True)
class Kind:
    """An implementation."""

    mux: Callable[..., Mux]
    budget: Callable[[int], WindowBudget | ReferenceBudget]


KINDS = [Kind(_native.Mux, WindowBudget), Kind(ReferenceMux, ReferenceBudget)]


class Side:
    """A mux, and a socket's worth of bytes towards the other one."""

    def __init__(self, kind: Kind, *, initiator: bool, budget: int = 1 << 40) -> None:
        send_key, receive_key = KEYS if initiator else KEYS[::-1]
        self.windows = kind.budget(budget)
        self.mux = kind.mux(
            initiator=initiator, send_key=send_key, receive_key=receive_key, windows=self.windows
        )
        self.mux.start(b"")
        self.writable: list[int] = []

    def output(self, max_bytes: int = BIG) -> bytes:
        data, writable = self.mux.take_output(max_bytes)
        self.writable += writable
        return data

    def move(self, target: Side, now: float = 0.0) -> list[Event]:
        return target.mux.receive(self.output(), now)


@pytest.fixture(params=KINDS, ids=["native", "reference"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def one(kind: Kind) -> Side:
    return Side(kind, initiator=True)


@pytest.fixture
def two(kind: Kind) -> Side:
    return Side(kind, initiator=False)


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


def test_a_payload_is_delivered_as_it_comes_and_not_held_back(two: Side) -> None:
    peer = Peer(two.mux)
    peer.say(frame(yamux.DATA, yamux.SYN, 1, 0))
    assert peer.say(frame(yamux.DATA, yamux.FIN, 1, 6) + b"abc") == [(READABLE, 1, 0)]
    assert two.mux.read(1, 99) == b"abc"
    assert peer.say(b"def") == [(READABLE, 1, 0), (ENDED, 1, 0)]


def test_credit_is_granted_for_half_a_window_and_not_for_every_read(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.send(stream, bytes(INITIAL_WINDOW))
    one.move(two)
    two.mux.read(stream, INITIAL_WINDOW // 2 - 1)
    assert two.mux.output_bytes == 0
    two.mux.read(stream, 1)
    assert two.mux.output_bytes == HEADER.size


def pump(one: Side, two: Side, stream: int, *, rounds: int, seconds: float = 0.0, leave: int = 0) -> int:
    """Send and read as much as goes, `leave` bytes unread, `seconds` a round. Returns the most sent in one."""
    most, now = 0, 100.0
    two.mux.ping(now)
    two.move(one, now)
    one.move(two, now + 0.1)  # a round trip of 100 ms
    for _ in range(rounds):
        now += seconds
        sent = 0
        while size := one.mux.send(stream, MUCH):
            sent += size
            one.move(two, now)
        two.mux.read(stream, max(0, two.mux.available(stream) - leave))
        two.move(one, now)
        most = max(most, sent)
    return most


def test_a_window_grows_for_a_reader_that_keeps_up_and_only_so_far(one: Side, two: Side) -> None:
    assert pump(one, two, opened(one, two), rounds=20) <= MAX_WINDOW
    assert two.windows.used == MAX_WINDOW - INITIAL_WINDOW


def test_a_window_stays_for_a_reader_that_never_catches_up(one: Side, two: Side) -> None:
    pump(one, two, opened(one, two), rounds=20, leave=1)
    assert two.windows.used == 0


def test_a_window_that_takes_many_round_trips_to_use_up_stays(one: Side, two: Side) -> None:
    pump(one, two, opened(one, two), rounds=20, seconds=0.5)
    slow = two.windows.used
    assert slow == EASY_WINDOW - INITIAL_WINDOW
    pump(one, two, opened(one, two), rounds=5, seconds=0.1)
    assert two.windows.used - slow > slow


def test_growth_of_all_windows_together_is_bounded_and_comes_back(one: Side, two: Side) -> None:
    streams = [opened(one, two) for _ in range(2 * EXTRA_WINDOWS // MAX_WINDOW)]
    for stream in streams:
        pump(one, two, stream, rounds=9)
    assert two.windows.used == EXTRA_WINDOWS
    for stream in streams:
        one.mux.reset(stream)
    one.move(two)
    assert two.windows.used == 0


def test_connections_share_a_budget_and_a_lost_one_gives_its_part_back(kind: Kind) -> None:
    one, two = Side(kind, initiator=True), Side(kind, initiator=False, budget=100_000)
    pump(one, two, opened(one, two), rounds=9)
    assert two.windows.used == 100_000
    del two.mux
    assert two.windows.used == 0


@pytest.mark.parametrize("size", [INITIAL_WINDOW, INITIAL_WINDOW + 1])
def test_more_than_the_window_breaks_the_protocol(two: Side, size: int) -> None:
    peer = Peer(two.mux)
    peer.say(frame(yamux.DATA, yamux.SYN, 1, 0))
    if size > INITIAL_WINDOW:
        with pytest.raises(RemoteProtocolError, match="window"):
            peer.say(frame(yamux.DATA, 0, 1, size))
    else:
        peer.say(frame(yamux.DATA, 0, 1, size))


def test_nothing_is_kept_of_streams_that_both_sides_ended(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.send(stream, b"data")
    one.mux.end(stream)
    two.mux.end(stream)
    two.move(one)
    one.move(two)
    assert two.mux.inbound_streams == 1
    two.mux.read(stream, 4)
    assert two.mux.inbound_streams == two.mux.unread_bytes == 0
    with pytest.raises(StreamError):
        one.mux.send(stream, b"x")


def test_what_nobody_wants_is_dropped_and_its_writer_reset_when_the_window_is_full(
    one: Side, two: Side
) -> None:
    stream = opened(one, two)
    two.mux.end(stream)
    two.mux.discard(stream)
    assert one.mux.send(stream, bytes(INITIAL_WINDOW - 1)) == INITIAL_WINDOW - 1
    assert one.move(two) == []
    assert two.move(one) == [(ENDED, stream, 0)]
    one.mux.send(stream, b"x")
    one.move(two)
    assert two.move(one) == [(RESET, stream, 0)]
    assert two.mux.unread_bytes == 0


def test_what_was_sent_before_an_end_and_a_discard_arrives(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.send(stream, bytes(100_000))
    one.mux.end(stream)
    one.mux.discard(stream)
    assert one.move(two) == [(READABLE, stream, 0), (ENDED, stream, 0)]
    assert two.mux.available(stream) == 100_000


def test_closed_streams_that_the_other_side_keeps_are_bounded(one: Side, two: Side) -> None:
    first = one.mux.open_stream()
    one.mux.end(first)
    one.mux.discard(first)
    one.move(two)
    for _ in range(yamux.MAX_LINGERING - 1):
        stream = one.mux.open_stream()
        one.mux.end(stream)
        one.mux.discard(stream)
    assert (RESET, first, 0) not in one.move(two)
    stream = one.mux.open_stream()
    one.mux.end(stream)
    one.mux.discard(stream)
    assert (RESET, first, 0) in one.move(two)


def test_streams_beyond_the_limit_are_reset(two: Side) -> None:
    peer = Peer(two.mux)
    streams = range(1, 2 * yamux.MAX_INBOUND_STREAMS + 3, 2)
    events = peer.say(*(frame(yamux.DATA, yamux.SYN, stream, 0) for stream in streams))
    assert len(events) == two.mux.inbound_streams == yamux.MAX_INBOUND_STREAMS
    assert peer.heard()[-1] == (yamux.WINDOW_UPDATE, yamux.RST, streams[-1], 0)


def test_unread_bytes_over_the_limit_cost_the_fullest_stream_and_not_the_connection(two: Side) -> None:
    peer = Peer(two.mux)
    full = range(1, 2 * (yamux.MAX_UNREAD_BYTES // INITIAL_WINDOW), 2)
    for stream in full:
        assert peer.say(frame(yamux.DATA, yamux.SYN, stream, INITIAL_WINDOW), bytes(INITIAL_WINDOW)) != []
    assert two.mux.unread_bytes == yamux.MAX_UNREAD_BYTES
    last = full[-1] + 2
    events = peer.say(frame(yamux.DATA, yamux.SYN, last, 1), b"x")
    assert events == [(OPENED, last, 0), (READABLE, last, 0), (RESET, full[0], 1)]
    assert two.mux.unread_bytes == yamux.MAX_UNREAD_BYTES - INITIAL_WINDOW + 1
    assert (yamux.WINDOW_UPDATE, yamux.RST, full[0], 0) in peer.heard()
    assert two.mux.read(last, 9) == b"x"


def test_a_peer_that_never_reads_its_answers_is_cut_off(two: Side) -> None:
    peer = Peer(two.mux)
    pings = frame(yamux.PING, yamux.SYN, 0, 1) * 10_000
    with pytest.raises(RemoteProtocolError, match="reading"):
        for _ in range(20):
            peer.say(pings)
    assert two.mux.output_bytes <= outgoing.MAX_REPLY_BYTES + HEADER.size


def test_a_peer_that_reads_its_answers_may_ping_for_ever(two: Side) -> None:
    peer = Peer(two.mux)
    count = outgoing.MAX_REPLY_BYTES // HEADER.size // 4
    for _ in range(5):
        peer.say(frame(yamux.PING, yamux.SYN, 0, 1) * count)
        assert peer.heard() == [(yamux.PING, yamux.ACK, 0, 1)] * count


def test_a_peer_that_never_reads_its_credit_makes_one_update_wait(two: Side) -> None:
    peer = Peer(two.mux)
    peer.say(frame(yamux.DATA, yamux.SYN, 1, 0))
    for _ in range(50):
        peer.say(frame(yamux.DATA, 0, 1, INITIAL_WINDOW), bytes(INITIAL_WINDOW))
        two.mux.read(1, BIG)
    assert two.mux.output_bytes == 2 * HEADER.size
    credit = peer.heard()[-1][3]
    assert credit >= 50 * INITIAL_WINDOW


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(1, 0, 0, 1, 0),
        HEADER.pack(0, 4, 0, 1, 0),
        HEADER.pack(0, 0, 16, 1, 0),
        frame(yamux.DATA, 0, 0, 5),
        frame(yamux.DATA, yamux.SYN, 2, 0),
        frame(yamux.DATA, yamux.SYN, 1, 0) * 2,
        frame(yamux.DATA, 0, 1, MAX_WINDOW + 1),
        frame(yamux.WINDOW_UPDATE, yamux.SYN, 1, 0xFFFFFFFF),
        frame(yamux.DATA, yamux.SYN | yamux.FIN, 1, 0) + frame(yamux.DATA, 0, 1, 1),
    ],
    ids=[
        "version",
        "type",
        "flags",
        "stream 0",
        "our parity",
        "twice",
        "too long",
        "overflow",
        "after the end",
    ],
)
def test_a_broken_frame_is_refused(two: Side, data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Peer(two.mux).say(data)


def frames_in_order(side: Side) -> list[tuple[int, int, int | None]]:
    """Kind, stream and, of data, length of each frame that a side has to send."""
    noise = NoiseSession(send_key=KEYS[1], receive_key=KEYS[0])
    plain = b"".join(noise.receive(side.output()))
    order, at = [], 0
    while at < len(plain):
        _, kind, _, stream, length = HEADER.unpack_from(plain, at)
        at += HEADER.size + (length if kind == yamux.DATA else 0)
        order.append((kind, stream, length if kind == yamux.DATA else None))
    return order


def test_control_frames_overtake_data_and_small_messages_overtake_bulk(one: Side, two: Side) -> None:
    bulk, small = one.mux.open_stream(), one.mux.open_stream()
    one.mux.send(bulk, bytes(INITIAL_WINDOW))
    one.mux.send(small, b"call")
    one.mux.ping(0.0)
    order = frames_in_order(one)
    assert order[:4] == [
        (yamux.WINDOW_UPDATE, bulk, None),
        (yamux.WINDOW_UPDATE, small, None),
        (yamux.PING, 0, None),
        (yamux.DATA, small, 4),
    ]
    assert {stream for _, stream, _ in order[4:]} == {bulk}


def test_streams_with_much_to_send_take_turns(one: Side, two: Side) -> None:
    streams = [one.mux.open_stream() for _ in range(3)]
    for stream in streams:
        one.mux.send(stream, bytes(INITIAL_WINDOW))
    turns = [stream for kind, stream, _ in frames_in_order(one) if kind == yamux.DATA]
    assert turns[:9] == 3 * streams


def test_small_messages_do_not_hold_bulk_back_for_ever(one: Side, two: Side) -> None:
    bulk = one.mux.open_stream()
    one.mux.send(bulk, bytes(INITIAL_WINDOW))
    for _ in range(40):
        one.mux.send(one.mux.open_stream(), bytes(outgoing.SHORT_BYTES))
    data = [(stream, length) for kind, stream, length in frames_in_order(one) if kind == yamux.DATA]
    first = next(at for at, (stream, _) in enumerate(data) if stream == bulk)
    overtaken_by = sum(HEADER.size + (length or 0) for _, length in data[:first])
    assert (
        outgoing.OVERTAKING_BYTES
        <= overtaken_by
        < outgoing.OVERTAKING_BYTES + outgoing.SHORT_BYTES + HEADER.size
    )


def test_queues_are_bounded_and_a_refused_sender_hears_when_there_is_room(one: Side, two: Side) -> None:
    streams = [opened(one, two) for _ in range(300)]
    taken = [one.mux.send(stream, bytes(2 * INITIAL_WINDOW)) for stream in streams]
    plenty = outgoing.CROWDED_BYTES // outgoing.QUEUE_BYTES + 1
    assert taken[:plenty] == [outgoing.QUEUE_BYTES] * plenty
    assert taken[plenty:] == sorted(taken[plenty:], reverse=True)
    assert taken[-1] == outgoing.CROWDED_QUEUE_BYTES
    assert not one.mux.send_all_or_nothing(streams[-1], [b"x"])
    one.move(two)
    assert one.writable == streams[plenty:]  # the others have no window left
    assert one.mux.send(streams[-1], bytes(1000)) == 1000


def test_a_sender_among_many_is_woken_once_for_its_share(one: Side, two: Side) -> None:
    streams = [opened(one, two) for _ in range(64)]
    for stream in streams:
        one.mux.send(stream, bytes(2 * INITIAL_WINDOW))
    while not one.writable:
        one.output(1)
    share = outgoing.CROWDED_BYTES // 64
    assert share == 4 * outgoing.CROWDED_QUEUE_BYTES
    assert all(one.mux.send(stream, bytes(INITIAL_WINDOW)) >= share for stream in one.writable)


def test_all_or_nothing_queues_nothing_when_a_part_does_not_fit(one: Side, two: Side) -> None:
    stream = opened(one, two)
    assert not one.mux.send_all_or_nothing(stream, [b"a", bytes(INITIAL_WINDOW)])
    assert one.mux.output_bytes == 0
    assert one.mux.send_all_or_nothing(stream, [b"a", bytes(INITIAL_WINDOW - 1)])


def test_output_comes_in_pieces_of_about_the_size_asked_for(one: Side, two: Side) -> None:
    stream = opened(one, two)
    one.mux.send(stream, bytes(INITIAL_WINDOW))
    assert len(one.output(1)) <= 65_537
    assert 100_000 <= len(one.output(100_000)) <= 100_000 + 65_537


def test_plain_records_come_before_the_start_and_frames_behind_it(kind: Kind) -> None:
    windows = kind.budget(0)
    one = kind.mux(initiator=True, send_key=KEYS[0], receive_key=KEYS[1], windows=windows)
    two = kind.mux(initiator=False, send_key=KEYS[1], receive_key=KEYS[0], windows=windows)
    with pytest.raises(LocalProtocolError):
        one.receive(b"", 0.0)
    sealed = one.seal(b"/yamux/1.0.0") + one.seal(bytes(70_000))
    assert two.open(sealed[:5]) == b""
    assert two.open(sealed[5:]) == b"/yamux/1.0.0" + bytes(70_000)
    one.start(b"")
    stream = one.open_stream()
    early = frame(yamux.DATA, yamux.SYN, stream, 2) + b"a"
    assert two.start(early) == [(OPENED, stream, 0), (READABLE, stream, 0)]
    with pytest.raises(LocalProtocolError):
        two.seal(b"x")
