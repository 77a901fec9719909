from __future__ import annotations

import contextlib
import socket

import pytest
import trio
import trio.testing

from lattica.errors import LocalProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.net.local import PAIR_BYTES, LocalStream, stream_pair

ADA = PeerId.from_public_key(bytes(32))


@contextlib.asynccontextmanager
async def _pair(kind: str):  # type: ignore[no-untyped-def]  # a generator of two streams
    if kind == "memory":
        left, right = stream_pair(ADA, "/x")
    else:
        ends = socket.socketpair()
        left, right = (LocalStream(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in ends)
    try:
        yield left, right
    finally:
        left.reset()
        right.reset()


both = pytest.mark.parametrize("kind", ["memory", "socket"])


@both
async def test_bytes_arrive_in_order_and_then_the_end(kind: str) -> None:
    async with _pair(kind) as (left, right):
        await left.send_all(b"one")
        await left.send_all(memoryview(b"two"))
        await left.send_eof()
        got = b""
        while data := await right.receive_some(2):
            got += data
        assert got == b"onetwo"
        assert right.receive_nowait() == b""
        await right.send_all(b"still")
        buffer = bytearray(10)
        assert await left.receive_into(memoryview(buffer)) == 5
        assert buffer[:5] == b"still"


@both
async def test_nothing_here_is_none(kind: str) -> None:
    async with _pair(kind) as (left, right):
        assert right.receive_nowait() is None
        await left.send_all(b"x")
        assert right.receive_nowait() == b"x"


@both
async def test_a_sender_waits_for_its_reader(kind: str) -> None:
    size = 4 * PAIR_BYTES
    got = bytearray()

    async def read(stream: Stream) -> None:
        while data := await stream.receive_some():
            got.extend(data)

    async with _pair(kind) as (left, right):
        with trio.move_on_after(0.01) as scope:
            await left.send_all(bytes(size))
        assert scope.cancelled_caught
    async with _pair(kind) as (left, right), trio.open_nursery() as nursery:
        nursery.start_soon(read, right)
        await left.send_all(bytes(size))
        await left.send_eof()
    assert len(got) == size


@both
async def test_a_break_is_told_once_whatever_is_unread(kind: str) -> None:
    async with _pair(kind) as (left, right):
        told = []
        broke = trio.Event()
        await left.send_all(b"unread")
        right.on_break(lambda: (told.append(1), broke.set()))
        left.reset()
        with trio.fail_after(5):
            await broke.wait()
        assert told == [1]


@both
async def test_this_sides_own_leaving_is_no_break(kind: str) -> None:
    async with _pair(kind) as (_, right):
        told: list[int] = []
        right.on_break(lambda: told.append(1))
        right.reset()
        await trio.testing.wait_all_tasks_blocked(0.3 if kind == "socket" else 0)
        assert told == []


@both
async def test_a_reader_that_waits_is_woken_by_the_others_leaving(kind: str) -> None:
    async with _pair(kind) as (left, right), trio.open_nursery() as nursery:

        async def read() -> None:
            with contextlib.suppress(StreamError):
                assert await right.receive_some() == b""

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        left.reset()


@both
async def test_a_reader_that_waits_is_woken_by_this_sides_leaving(kind: str) -> None:
    async with _pair(kind) as (_, right), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(StreamError):
                await right.receive_some()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        right.reset()


async def test_parts_are_queued_together_or_not_at_all() -> None:
    async with _pair("memory") as (left, right):
        assert left.send_nowait([b"a", memoryview(b"b"), bytearray(b"c")])
        assert not left.send_nowait([bytes(PAIR_BYTES)])
        assert await right.receive_some() == b"abc"
        assert left.send_nowait([bytes(PAIR_BYTES)])
        await left.send_eof()
        with pytest.raises(LocalProtocolError):
            left.send_nowait([b"more"])


async def test_bytes_that_nobody_will_read_do_not_hold_their_sender_up() -> None:
    async with _pair("memory") as (left, right):
        await right.aclose()
        await left.send_all(bytes(3 * PAIR_BYTES))
        assert await left.receive_some() == b""
