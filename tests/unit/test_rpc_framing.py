"""Frames come out as they went in, however the bytes were cut; what is no frame is refused early."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattica.errors import RemoteProtocolError
from lattica.rpc.framing import SKIPPED, FrameReader, frame, varint

bodies = st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.binary(max_size=300)), max_size=6)


def wire(array: bytes, section: bytes) -> bytes:
    return b"".join(frame([array, memoryview(section)] if section else [array]))


def drain(reader: FrameReader) -> list[tuple[bytes, bytes]]:
    out = []
    while (body := reader.next()) is not None:
        out.append((bytes(body[0]), bytes(body[1])))
    return out


@given(bodies, st.lists(st.integers(0, 2000), max_size=12))
def test_frames_survive_any_cutting(sent: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    stream = b"".join(wire(*body) for body in sent)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader, got = FrameReader(), []
    for start, end in pairwise(edges):
        reader.feed(stream[start:end])
        got += drain(reader)
    assert got == sent
    assert reader.is_between_frames
    assert reader.unread == 0


@given(st.binary(max_size=200), st.integers(1, 50))
def test_random_bytes_raise_only_remote_protocol_error(stream: bytes, step: int) -> None:
    reader = FrameReader(max_bytes=1000)
    try:
        for at in range(0, len(stream), step):
            reader.feed(stream[at : at + step])
            drain(reader)
    except RemoteProtocolError:
        assert reader.is_failed


def test_frames_before_a_wrong_one_are_still_given_out() -> None:
    reader = FrameReader()
    reader.feed(wire(b"good", b"") + b"\xff" * 10)
    assert drain_one(reader) == b"good"
    with pytest.raises(RemoteProtocolError, match="length"):
        reader.next()
    reader.feed(wire(b"late", b""))
    with pytest.raises(RemoteProtocolError):
        reader.next()


def drain_one(reader: FrameReader) -> bytes:
    body = reader.next()
    assert body is not None
    return body[0]


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(varint(10_001) + varint(0), id="array over the limit"),
        pytest.param(varint(1) + varint(10_000), id="section over the limit"),
        pytest.param(varint(0) + varint(0), id="empty array"),
        pytest.param(b"\x81\x00\x00", id="length not written the short way"),
        pytest.param(b"\xff\xff\xff\xff\xff\x01", id="length of six bytes"),
    ],
)
def test_a_length_out_of_bounds_is_refused_before_its_body(head: bytes) -> None:
    reader = FrameReader(max_bytes=10_000)
    reader.feed(head)
    with pytest.raises(RemoteProtocolError):
        reader.next()


@pytest.mark.parametrize(
    ("array", "section", "sent"),
    [(60 << 20, 0, 1000), (5, 60 << 20, 0), (5, 60 << 20, 1005), (20 << 20, 40 << 20, 9)],
)
def test_an_announced_length_takes_no_memory_before_it_arrives(array: int, section: int, sent: int) -> None:
    readers = [FrameReader() for _ in range(5)]
    tracemalloc.start()
    try:
        for reader in readers:
            reader.feed(varint(array) + varint(section) + b"x" * sent)
            assert reader.next() is None
            reader.buffer()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 300_000
    assert {reader.missing for reader in readers} == {array + section - sent}


@given(st.integers(1, 2_000_000), st.integers(1, 40_000), st.integers(1, 700_000), st.integers(0, 3000))
@settings(max_examples=30)
def test_a_large_section_is_received_into_place(array: int, step: int, size: int, ahead: int) -> None:
    array %= 300
    sent = bytes(range(256)) * (size // 256 + 1)
    stream = memoryview(varint(array + 1) + varint(size) + bytes(array + 1) + sent[:size])
    reader = FrameReader()
    reader.feed(bytes(stream[:ahead]))
    rest = stream[ahead:]
    while (body := reader.next()) is None:
        buffer = reader.buffer()
        if buffer is None:
            reader.feed(bytes(rest[:step]))
            rest = rest[step:]
        else:
            assert reader.missing >= len(buffer)
            count = min(step * 20, len(buffer))
            buffer[:count] = rest[:count]
            reader.received(count)
            rest = rest[count:]
    assert not rest
    assert body == (bytes(array + 1), sent[:size])
    if not body[1].readonly:  # a buffer of its own, not a view of what came in one piece
        assert np.frombuffer(body[1], np.uint8).ctypes.data % 64 == 0


@given(bodies, st.lists(st.integers(0, 2000), max_size=12), st.integers(1, 400))
def test_skipped_frames_leave_their_edges_and_nothing_else(
    sent: list[tuple[bytes, bytes]], cuts: list[int], ask_from: int
) -> None:
    stream = b"".join(wire(*body) for body in sent)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader, got = FrameReader(ask_from=ask_from), []
    for start, end in pairwise(edges):
        reader.feed(stream[start:end])
        while True:
            if (body := reader.next()) is not None:
                got.append(body)
            elif reader.asks:
                (reader.admit if reader.announced % 2 else reader.skip)()
            else:
                break
    assert len(got) == len(sent)
    for body, (array, section) in zip(got, sent, strict=True):
        size = len(array) + len(section)
        if size > ask_from and size % 2 == 0:
            assert body[1] is SKIPPED
            assert body[0] == array[:2] + array[2:][-1:]
        else:
            assert body == (array, section)
    assert reader.is_between_frames


def test_large_parts_are_not_copied_and_small_ones_are_joined() -> None:
    large = memoryview(bytes(100_000))
    parts = frame([b"array", b"gap", large, b"gap", memoryview(b"small")])
    assert parts[1] is large
    assert len(parts) == 3


def test_tiny_frames_take_no_more_room_than_their_bytes() -> None:
    reader = FrameReader()
    stream = wire(b"x", b"") * 20_000
    tracemalloc.start()
    try:
        reader.feed(stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000
    assert reader.unread > 3 * 19_999
    assert len(drain(reader)) == 20_000
