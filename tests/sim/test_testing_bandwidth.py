"""The bandwidth of MemoryNetwork's connections: exact times, fair turns, bounded queues."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from lattica.errors import StreamError
from lattica.net.api import Stream
from lattica.protocols import KIB, MIB
from lattica.testing import MemoryNetwork

PROTOCOL = "/lattica/test"
FRAME = 16 * KIB  # while others wait
ALONE = 64 * KIB


@asynccontextmanager
async def pairs(network: MemoryNetwork, count: int = 1) -> AsyncIterator[list[tuple[Stream, Stream]]]:
    """Both ends of streams from alice to bob."""
    alice, bob = network.host("alice"), network.host("bob")
    send, receive = trio.open_memory_channel[Stream](count)

    async def keep(stream: Stream) -> None:
        await send.send(stream)
        await trio.sleep_forever()

    bob.serve(PROTOCOL, keep)
    await alice.connect(bob.addresses[0])
    streams = []
    for _ in range(count):
        here = await alice.open_stream(bob.peer_id, [PROTOCOL])
        streams.append((here, await receive.receive()))
    yield streams


async def read(stream: Stream, size: int, times: list[float]) -> None:
    """Read so many bytes; note when that was done."""
    while size:
        size -= len(await stream.receive_some(size))
    times.append(trio.current_time())


async def test_bytes_take_their_time_and_the_latency(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.5, bandwidth=1000) as network, pairs(network) as [(here, there)]:
        started, times = trio.current_time(), list[float]()
        await here.send_all(bytes(2000))
        assert trio.current_time() == started  # the queue takes it
        await read(there, 2000, times)
        assert times == [pytest.approx(started + 2.5)]
        await here.send_all(b"x")  # an idle line saves nothing up
        await read(there, 1, times)
        assert times[1] == pytest.approx(started + 2.5 + 0.5 + 0.001)


async def test_frames_arrive_one_by_one(autojump_clock: object) -> None:
    async with MemoryNetwork(bandwidth=ALONE) as network, pairs(network) as [(here, there)]:
        started, times = trio.current_time(), list[float]()
        await here.send_all(bytes(3 * ALONE))
        for _ in range(3):
            await read(there, ALONE, times)
        assert [time - started for time in times] == pytest.approx([1, 2, 3])


async def test_each_direction_has_its_own(autojump_clock: object) -> None:
    async with MemoryNetwork(bandwidth=1000) as network, pairs(network) as [(here, there)]:
        started, times = trio.current_time(), list[float]()
        await here.send_all(bytes(3000))
        await there.send_all(bytes(3000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, there, 3000, times)
            nursery.start_soon(read, here, 3000, times)
        assert times == [pytest.approx(started + 3)] * 2


async def test_streams_share_a_line_fairly(autojump_clock: object) -> None:
    size = 8 * FRAME
    async with MemoryNetwork(bandwidth=FRAME) as network, pairs(network, 4) as streams:
        started, times = trio.current_time(), list[float]()
        async with trio.open_nursery() as nursery:
            for here, there in streams:
                await here.send_all(bytes(size))
                nursery.start_soon(read, there, size, times)
        # The first was alone and took a large frame (0 to 4); from then on they took turns.
        assert [time - started for time in times] == pytest.approx([20, 30, 31, 32])


async def test_a_small_message_waits_for_one_frame_of_a_bulk_stream(autojump_clock: object) -> None:
    async with (
        MemoryNetwork(bandwidth=MIB) as network,
        pairs(network, 2) as [(bulk, sink), (small, there)],
    ):
        started, times = trio.current_time(), list[float]()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.send_all, bytes(4 * MIB))
            nursery.start_soon(read, sink, 4 * MIB, [])
            await trio.sleep(1.01)
            assert small.send_nowait([b"x"])
            await read(there, 1, times)
        # The bulk stream's 17th frame was being sent.
        assert times[0] - started == pytest.approx((17 * ALONE + 1) / MIB)


async def test_a_changed_bandwidth_holds_from_the_next_frame(autojump_clock: object) -> None:
    async with MemoryNetwork() as network, pairs(network) as [(here, there)]:
        network.set_bandwidth("alice", "bob", ALONE)
        started, times = trio.current_time(), list[float]()
        await here.send_all(bytes(3 * ALONE))
        await trio.sleep(0.5)
        network.set_bandwidth("bob", "alice", 4 * ALONE)
        for _ in range(3):
            await read(there, ALONE, times)
        assert [time - started for time in times] == pytest.approx([1, 1.25, 1.5])


async def test_it_may_be_set_before_there_is_a_connection(autojump_clock: object) -> None:
    async with MemoryNetwork() as network:
        network.set_bandwidth("alice", "bob", 1000)
        async with pairs(network) as [(here, there)]:
            started, times = trio.current_time(), list[float]()
            await here.send_all(bytes(1000))
            await read(there, 1000, times)
            assert times == [pytest.approx(started + 1)]


async def test_a_stalled_reader_stalls_its_own_writer_only(autojump_clock: object) -> None:
    async with (
        MemoryNetwork(bandwidth=MIB, window_bytes=64 * KIB) as network,
        pairs(network, 2) as [(stalled, unread), (other, there)],
    ):
        with trio.move_on_after(60) as writing:
            await stalled.send_all(bytes(64 * KIB + 1))
        assert writing.cancelled_caught
        started, times = trio.current_time(), list[float]()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.send_all, bytes(MIB))
            await read(there, MIB, times)
        assert times == [pytest.approx(started + 1)]
        assert len(unread.receive_nowait() or b"") == 64 * KIB


async def test_a_partition_sends_nothing_and_then_at_the_same_rate(autojump_clock: object) -> None:
    async with MemoryNetwork(bandwidth=ALONE, break_after=60) as network, pairs(network) as [(here, there)]:
        started, times = trio.current_time(), list[float]()
        await here.send_all(bytes(4 * ALONE))
        await trio.sleep(0.5)
        network.partition(["alice"], ["bob"])
        await trio.sleep(10)
        network.heal()
        for _ in range(4):
            await read(there, ALONE, times)
        # The first frame had left the sender by half: it arrives, like all that was under way, when it heals.
        assert [time - started for time in times] == pytest.approx([10.5, 11.5, 12.5, 13.5])


async def test_a_reset_drops_the_queue_and_overtakes_it(autojump_clock: object) -> None:
    async with (
        MemoryNetwork(bandwidth=ALONE, latency=0.25) as network,
        pairs(network, 2) as [(broken, there), (other, unbroken)],
    ):
        started, times = trio.current_time(), list[float]()
        await broken.send_all(bytes(4 * ALONE))
        await other.send_all(bytes(ALONE))
        there.on_break(lambda: times.append(trio.current_time()))
        broken.reset()
        await read(unbroken, ALONE, times)
        # The reset follows the frame that was being sent, then comes the other stream.
        assert [time - started for time in times] == pytest.approx([1.25, 2.25])
        with pytest.raises(StreamError):
            there.receive_nowait()


async def test_what_waits_for_a_slow_line_is_bounded(autojump_clock: object) -> None:
    """256 KiB a stream; 16 KiB more a stream once a MiB waits on the connection, so that a crowd stays small."""
    async with MemoryNetwork(bandwidth=1, window_bytes=4 * MIB) as network, pairs(network, 20) as streams:
        queued = 0
        for here, _ in streams:
            while here.send_nowait([bytes(FRAME)]):
                queued += FRAME
        # One frame is being sent; four streams fill up before it is crowded.
        assert queued == FRAME + 4 * 256 * KIB + 16 * FRAME
