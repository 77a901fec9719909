"""What a stream of MemoryNetwork offers beside sending and receiving: without waiting, into a buffer, its break."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from lattica.errors import StreamError
from lattica.net.api import Stream
from lattica.testing import MemoryNetwork
from lattica.testing.pipes import MemoryStream

PROTOCOL = "/lattica/test"


@asynccontextmanager
async def pair(network: MemoryNetwork) -> AsyncIterator[tuple[MemoryStream, Stream]]:
    """Both ends of a stream from alice to bob, who keeps his until the block ends."""
    alice, bob = network.host("alice"), network.host("bob")
    there, taken, done = [], trio.Event(), trio.Event()

    async def keep(stream: Stream) -> None:
        there.append(stream)
        taken.set()
        await done.wait()

    bob.serve(PROTOCOL, keep)
    await alice.connect(bob.addresses[0])
    stream = await alice.open_stream(bob.peer_id, [PROTOCOL])
    await taken.wait()
    try:
        yield stream, there[0]
    finally:
        done.set()
        bob.unserve(PROTOCOL)


def clock_of(times: list[float]) -> Callable[[], None]:
    """A callback that writes down when it is called."""
    return lambda: times.append(trio.current_time())


async def test_what_is_here_is_received_without_waiting(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1) as network, pair(network) as (here, there):
        assert here.send_nowait([b"one ", bytearray(b"two "), memoryview(b"three")])
        assert there.receive_nowait() is None
        await trio.sleep(0.1)
        assert there.receive_nowait(4) == b"one "
        assert there.receive_nowait() == b"two three"
        assert there.receive_nowait() is None
        await here.send_eof()
        await trio.sleep(0.1)
        assert there.receive_nowait() == there.receive_nowait() == b""
        with pytest.raises(StreamError):
            here.send_nowait([b"more"])


async def test_all_parts_are_queued_or_none(autojump_clock: object) -> None:
    async with MemoryNetwork(window_bytes=1000) as network, pair(network) as (here, there):
        assert here.send_nowait([bytes(600)])
        assert not here.send_nowait([bytes(300), bytes(101)])
        assert len(there.receive_nowait() or b"") == 600
        assert here.send_nowait([bytes(300), bytes(101)])
        assert len(there.receive_nowait() or b"") == 401
        assert not here.send_nowait([bytes(1001)])
        assert here.send_nowait([])


async def test_bytes_are_received_into_a_buffer(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1) as network, pair(network) as (here, there):
        buffer = bytearray(b"........")
        await here.send_all(b"hello world")
        assert await there.receive_into(memoryview(buffer)[:5]) == 5
        assert buffer == b"hello..."
        assert await there.receive_into(memoryview(buffer)) == 6
        assert buffer == b" world.."
        await here.send_eof()
        assert await there.receive_into(memoryview(buffer)) == 0


async def test_a_reset_is_told_after_the_latency_whatever_is_unread(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1) as network, pair(network) as (here, there):
        times: list[float] = []
        there.on_break(clock_of(times))
        await here.send_all(bytes(100_000))
        await trio.sleep(5)
        here.on_break(lambda: pytest.fail("this side reset it"))
        reset = trio.current_time()
        here.reset()
        await trio.sleep(5)
        assert times == [pytest.approx(reset + 0.1)]
        there.on_break(clock_of(times))  # so already: at once, and once
        assert times[1:] == [pytest.approx(reset + 5)]


async def test_a_reset_held_back_by_a_partition_is_told_when_it_arrives(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1, break_after=60) as network, pair(network) as (here, there):
        times: list[float] = []
        there.on_break(clock_of(times))
        network.partition(["alice"], ["bob"])
        here.reset()
        await trio.sleep(5)
        assert times == []
        network.heal()
        healed = trio.current_time()
        await trio.sleep(5)
        assert times == [pytest.approx(healed + 0.1)]


@pytest.mark.parametrize("resets_too", [False, True])
async def test_a_lost_connection_is_told_on_both_sides(autojump_clock: object, resets_too: bool) -> None:
    async with MemoryNetwork(latency=0.1, break_after=15) as network, pair(network) as (here, there):
        times: list[float] = []
        there.on_break(clock_of(times))
        if not resets_too:
            here.on_break(clock_of(times))
        started = trio.current_time()
        network.partition(["alice"], ["bob"])
        if resets_too:  # and the word of it never arrives
            here.reset()
        await trio.sleep(60)
        assert times == [pytest.approx(started + 15)] * (1 if resets_too else 2)
        with pytest.raises(StreamError, match="timed out"):
            await there.receive_some()


async def test_what_arrived_before_a_connection_was_lost_can_be_read(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1) as network, pair(network) as (here, there):
        await here.send_all(b"early")
        await trio.sleep(0.1)
        await here.send_all(b"late")
        network.cut("alice", "bob")
        assert await there.receive_some() == b"early"
        with pytest.raises(StreamError, match="cut"):
            await there.receive_some()


async def test_an_end_is_no_break(autojump_clock: object) -> None:
    async with MemoryNetwork() as network, pair(network) as (here, there):
        there.on_break(lambda: pytest.fail("it only ended"))
        await here.aclose()
        assert await there.receive_some() == b""
        there.on_break(None)
        await trio.sleep(5)


async def test_streams_may_be_reset_after_the_network_is_gone(autojump_clock: object) -> None:
    async with MemoryNetwork() as network, pair(network) as (here, there):
        there.on_break(lambda: None)
    here.reset()
