from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.net import yamux
from lattica.net.yamux import HEADER, Ended, Event, Opened, Received, WasReset, WentAway, Writable, Yamux

INITIAL = yamux.INITIAL_WINDOW


def pair() -> tuple[Yamux, Yamux]:
    return Yamux(initiator=True), Yamux(initiator=False)


def move(source: Yamux, target: Yamux) -> list[Event]:
    return target.receive(b"".join(source.take_output()))


def frame(kind: int, flags: int, stream: int, length: int) -> bytes:
    return HEADER.pack(0, kind, flags, stream, length)


def opened_pair() -> tuple[Yamux, Yamux, int]:
    one, two = pair()
    stream = one.open()
    assert move(one, two) == [Opened(stream)]
    move(two, one)
    return one, two, stream


def send_all(source: Yamux, stream: int, data: bytes) -> int:
    sent = 0
    while size := source.send(stream, memoryview(data)[sent:]):
        sent += size
    return sent


def test_bytes_arrive_in_order_and_the_end_after_them() -> None:
    one, two, stream = opened_pair()
    one.send(stream, memoryview(b"hello"))
    one.end(stream)
    assert move(one, two) == [Received(stream, b"hello"), Ended(stream)]


def test_the_other_direction_stays_open_after_an_end() -> None:
    one, two, stream = opened_pair()
    one.end(stream)
    move(one, two)
    two.send(stream, memoryview(b"answer"))
    two.end(stream)
    assert move(two, one) == [Received(stream, b"answer"), Ended(stream)]


def test_a_writer_gets_no_further_than_the_window_until_the_reader_reads() -> None:
    one, two, stream = opened_pair()
    assert send_all(one, stream, bytes(2 * INITIAL)) == INITIAL
    received = sum(len(event.data) for event in move(one, two) if isinstance(event, Received))
    assert received == INITIAL
    assert move(two, one) == []
    two.consume(stream, INITIAL)
    assert move(two, one) == [Writable(stream)]
    assert send_all(one, stream, bytes(INITIAL)) == INITIAL


def test_a_window_grows_for_a_reader_that_keeps_up_and_only_so_far() -> None:
    one, two, stream = opened_pair()
    for _ in range(10):
        send_all(one, stream, bytes(2 * yamux.MAX_WINDOW))
        for event in move(one, two):
            if isinstance(event, Received):
                two.consume(stream, len(event.data))
        move(two, one)
    assert two._streams[stream].window == yamux.MAX_WINDOW


def test_a_window_stays_for_a_reader_that_never_catches_up() -> None:
    one, two, stream = opened_pair()
    unread = 0
    for _ in range(20):
        send_all(one, stream, bytes(2 * yamux.MAX_WINDOW))
        unread += sum(len(event.data) for event in move(one, two) if isinstance(event, Received))
        two.consume(stream, unread - 1)
        unread = 1
        move(two, one)
    assert two._streams[stream].window <= 2 * INITIAL


def test_growth_of_all_windows_together_is_bounded() -> None:
    one, two = pair()
    for _ in range(2 * yamux.EXTRA_WINDOWS // yamux.MAX_WINDOW):
        stream = one.open()
        for _ in range(6):
            send_all(one, stream, bytes(yamux.MAX_WINDOW))
            for event in move(one, two):
                if isinstance(event, Received):
                    two.consume(stream, len(event.data))
            move(two, one)
    grown = sum(state.window - INITIAL for state in two._streams.values())
    assert two._extra == grown == yamux.EXTRA_WINDOWS


def test_credit_is_granted_for_half_a_window_and_not_for_every_read() -> None:
    one, two, stream = opened_pair()
    send_all(one, stream, bytes(INITIAL))
    move(one, two)
    two.consume(stream, INITIAL // 2 - 1)
    assert two.take_output() == []
    two.consume(stream, 1)
    assert len(two.take_output()) == 1


def test_more_than_the_window_is_cut_off() -> None:
    one, two, stream = opened_pair()
    with pytest.raises(RemoteProtocolError, match="window"):
        two.receive(frame(yamux.DATA, 0, stream, INITIAL + 1))
    assert one.output_bytes == 0


def test_a_payload_is_delivered_as_it_comes_and_not_held_back() -> None:
    _, two, stream = opened_pair()
    assert two.receive(frame(yamux.DATA, yamux.FIN, stream, 6) + b"abc") == [Received(stream, b"abc")]
    assert two.receive(b"def") == [Received(stream, b"def"), Ended(stream)]


def test_a_reset_stream_is_forgotten_on_both_sides() -> None:
    one, two, stream = opened_pair()
    one.send(stream, memoryview(b"lost"))
    one.reset(stream)
    assert move(one, two)[-1] == WasReset(stream)
    with pytest.raises(StreamError):
        two.send(stream, memoryview(b"x"))
    with pytest.raises(StreamError):
        one.send(stream, memoryview(b"x"))
    assert one._streams == two._streams == {}


def test_nothing_is_kept_of_streams_that_both_sides_ended() -> None:
    one, two, stream = opened_pair()
    one.send(stream, memoryview(b"data"))
    one.end(stream)
    two.end(stream)
    move(two, one)
    move(one, two)
    two.consume(stream, 4)
    assert one._streams == two._streams == {}
    assert (two._unread, two._inbound) == (0, 0)


def test_sending_after_the_end_is_our_own_fault() -> None:
    one, _, stream = opened_pair()
    one.end(stream)
    with pytest.raises(LocalProtocolError):
        one.send(stream, memoryview(b"x"))


def test_what_nobody_wants_is_dropped_and_its_writer_reset_when_the_window_is_full() -> None:
    one, two, stream = opened_pair()
    two.end(stream)
    two.discard(stream)
    assert send_all(one, stream, bytes(INITIAL - 1)) == INITIAL - 1
    assert move(one, two) == []
    assert WasReset(stream) not in move(two, one)
    one.send(stream, memoryview(b"x"))
    move(one, two)
    assert WasReset(stream) in move(two, one)


def test_closed_streams_that_the_other_side_keeps_are_bounded() -> None:
    one, _ = pair()
    for _ in range(yamux.MAX_LINGERING + 10):
        stream = one.open()
        one.end(stream)
        one.discard(stream)
    assert len(one._streams) == yamux.MAX_LINGERING


def test_streams_beyond_the_limit_are_reset() -> None:
    _, two = pair()
    streams = range(1, 2 * yamux.MAX_INBOUND_STREAMS + 3, 2)
    events = two.receive(b"".join(frame(yamux.DATA, yamux.SYN, stream, 0) for stream in streams))
    assert len(events) == yamux.MAX_INBOUND_STREAMS
    assert two.take_output()[-1] == frame(yamux.WINDOW_UPDATE, yamux.RST, streams[-1], 0)


def test_unread_bytes_of_one_connection_are_bounded() -> None:
    _, two = pair()
    streams = range(1, 2 * yamux.MAX_INBOUND_STREAMS, 2)
    flood = (frame(yamux.DATA, yamux.SYN, stream, INITIAL) + bytes(INITIAL) for stream in streams)
    with pytest.raises(RemoteProtocolError, match="unread"):
        deque(map(two.receive, flood), maxlen=0)
    assert two._unread <= yamux.MAX_BUFFERED_BYTES + INITIAL


def test_a_peer_that_never_reads_its_answers_is_cut_off() -> None:
    _, two = pair()
    pings = frame(yamux.PING, yamux.SYN, 0, 1) * 10_000
    with pytest.raises(RemoteProtocolError, match="reading"):
        deque(map(two.receive, itertools.repeat(pings)), maxlen=0)


def test_a_ping_comes_back() -> None:
    _, two = pair()
    assert two.receive(frame(yamux.PING, yamux.SYN, 0, 77)) == []
    assert two.take_output() == [frame(yamux.PING, yamux.ACK, 0, 77)]


def test_no_stream_is_opened_to_a_peer_that_went_away() -> None:
    one, two, stream = opened_pair()
    two.go_away()
    assert move(two, one) == [WentAway(0)]
    with pytest.raises(StreamError):
        one.open()
    assert one.send(stream, memoryview(b"still")) == 5


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(1, 0, 0, 1, 0),
        HEADER.pack(0, 4, 0, 1, 0),
        HEADER.pack(0, 0, 16, 1, 0),
        frame(yamux.DATA, 0, 0, 5),
        frame(yamux.DATA, yamux.SYN, 2, 0),
        frame(yamux.DATA, yamux.SYN, 1, 0) * 2,
        frame(yamux.DATA, 0, 1, yamux.MAX_WINDOW + 1),
        frame(yamux.WINDOW_UPDATE, yamux.SYN, 1, 0xFFFFFFFF),
    ],
    ids=["version", "type", "flags", "stream 0", "our parity", "opened twice", "too long", "window overflow"],
)
def test_a_broken_frame_is_refused(data: bytes) -> None:
    _, two = pair()
    with pytest.raises(RemoteProtocolError):
        two.receive(data)


@given(data=st.binary(max_size=400))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    _, two = pair()
    with contextlib.suppress(RemoteProtocolError):
        two.receive(data)


FRAMES = st.builds(
    frame,
    st.integers(0, 3),
    st.integers(0, 15),
    st.integers(0, 6),
    st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)),
)


@given(frames=st.lists(st.one_of(FRAMES, st.binary(max_size=20)), max_size=30), cut=st.integers(1, 40))
def test_likely_frames_in_any_order_raise_nothing_else(frames: list[bytes], cut: int) -> None:
    _, two = pair()
    two.open()
    data = b"".join(frames)
    with contextlib.suppress(RemoteProtocolError):
        for start in range(0, len(data), cut):
            for event in two.receive(data[start : start + cut]):
                if isinstance(event, Received):
                    two.consume(event.stream, len(event.data))
                elif isinstance(event, Ended):
                    two.discard(event.stream)


ACTIONS = st.tuples(
    st.sampled_from(["open", "send", "end", "reset", "discard", "move", "consume"]),
    st.booleans(),
    st.integers(0, 7),
    st.integers(1, 70_000),
)


@given(actions=st.lists(ACTIONS, max_size=60))
def test_two_sides_never_break_each_other_and_lose_nothing(actions: list[tuple[str, bool, int, int]]) -> None:
    sides = pair()
    sent: dict[tuple[int, int], bytes] = defaultdict(bytes)  # (receiver, stream)
    got: dict[tuple[int, int], bytes] = defaultdict(bytes)
    unread: dict[tuple[int, int], int] = defaultdict(int)
    known: list[int] = []

    def deliver(target: int) -> None:
        for event in move(sides[1 - target], sides[target]):
            if isinstance(event, Received):
                got[target, event.stream] += event.data
                unread[target, event.stream] += len(event.data)

    for kind, first, which, size in actions:
        actor = int(first)
        side, stream = sides[actor], known[which % len(known)] if known else 1
        if kind == "open":
            known.append(side.open())
        elif kind == "move":
            deliver(actor)
        elif kind == "consume":
            side.consume(stream, unread.pop((actor, stream), 0))
        else:
            with contextlib.suppress(StreamError, LocalProtocolError):
                if kind == "send":
                    data = bytes([size % 251]) * size
                    sent[1 - actor, stream] += data[: side.send(stream, memoryview(data))]
                elif kind == "end":
                    side.end(stream)
                elif kind == "reset":
                    side.reset(stream)
                else:
                    side.discard(stream)
    for _ in range(3):
        deliver(0)
        deliver(1)
    for place, data in got.items():
        assert sent[place].startswith(data)
    for index, side in enumerate(sides):
        assert side._unread == sum(state.unread for state in side._streams.values()), index
        assert side._inbound == sum(stream % 2 != side._next_id % 2 for stream in side._streams)
        assert all(state.receive_window >= 0 and state.send_window >= 0 for state in side._streams.values())
