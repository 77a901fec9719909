"""What flows too fast, too much or too large: held back, or refused with a word when to come back."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from lattica.errors import (
    DeadlineError,
    LocalProtocolError,
    OverloadedError,
    RemoteError,
    RemoteProtocolError,
)
from lattica.protocols import MAX_CALLS_PER_PEER, RPC
from lattica.rpc import Call, Limits
from lattica.rpc.call import Request, pack
from lattica.rpc.framing import varint
from lattica.testing import endpoint


async def test_a_slow_consumer_holds_back_the_producer_and_loses_nothing(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        made = 0

        @p.service.method
        async def produce(call: Call, n: int) -> AsyncIterator[Any]:
            nonlocal made
            for i in range(n):
                made += 1
                yield [i, bytes(10_000)]

        async with p.stream("produce", 300) as items:
            await trio.sleep(10)
            assert made < 60  # the window and what is read ahead: 320 KiB
            got = []
            async for number, _ in items:
                got.append(number)
                assert made - len(got) < 60
        assert got == list(range(300))


async def test_a_slow_handler_holds_back_the_sender_and_loses_nothing(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        got = []

        @p.service.method
        async def consume(call: Call) -> int:
            async for number, _ in call.items:
                await trio.sleep(0.1)
                got.append(number)
            return len(got)

        async with p.stream("consume") as stream:
            for i in range(300):
                await stream.send([i, bytes(10_000)])
                assert i - len(got) < 60
            assert await stream.result() == 300
        assert got == list(range(300))


async def test_calls_over_the_limit_are_refused_with_a_time_to_come_back(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(Limits(max_calls_per_peer=3)) as p:
        p.add_sleeper()

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(p.call, "unary")
            await trio.sleep(1)
            for _ in range(2):
                with pytest.raises(OverloadedError) as caught:
                    await p.call("unary")
                assert caught.value.retry_after > 0
            with pytest.raises(OverloadedError):
                async with p.stream("unary") as stream:
                    await stream.send(1)
                    await stream.result()
            nursery.cancel_scope.cancel()
        await trio.sleep(1)
        with pytest.raises(DeadlineError):  # there is room again
            await p.call("unary", timeout=1)


async def test_of_more_calls_than_the_limit_as_many_succeed_and_the_others_are_told(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(Limits(max_calls_per_peer=100)) as p:
        done, waits = [], []

        @p.service.method
        async def work(call: Call, n: int) -> int:
            await trio.sleep(0.5)
            return n

        async def one(n: int) -> None:
            try:
                done.append(await p.call("work", n))
            except OverloadedError as error:
                waits.append((str(error), error.retry_after))

        for burst in range(2):
            async with trio.open_nursery() as nursery:
                for n in range(150):
                    nursery.start_soon(one, n)
            assert len(done) == 100 * (burst + 1)
            assert len(waits) == 50 * (burst + 1)
        assert all("100 calls of this peer" in text for text, _ in waits)
        assert {wait for _, wait in waits[:50]} == {1.0}  # nothing has ended yet
        assert [wait for _, wait in waits[50:]] == [pytest.approx(0.5)] * 50  # as long as its calls take


async def test_a_peer_at_its_limits_costs_another_peer_nothing(pair: Any, autojump_clock: object) -> None:
    async with pair(Limits(max_calls_per_peer=3, max_streams_per_peer=5)) as p:
        p.add_sleeper()
        p.add_echo()
        carol = p.network.host("carol")
        rpc = endpoint(carol)
        await carol.connect(p.bob.addresses[0])
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(p.call, "unary")
            await trio.sleep(1)
            with pytest.raises(OverloadedError):
                await p.call("echo", 1)
            assert await rpc.call(p.bob.peer_id, "s.echo", 2) == 2
            nursery.cancel_scope.cancel()


async def test_streams_over_the_limit_are_told(pair: Any, autojump_clock: object) -> None:
    async with pair(Limits(max_streams_per_peer=2)) as p:
        p.add_sleeper()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.call, "unary")
            nursery.start_soon(p.call, "unary")
            await trio.sleep(1)
            for _ in range(2):
                with pytest.raises(OverloadedError, match="2 streams") as caught:
                    await p.call("unary", timeout=5)
                assert caught.value.retry_after > 0
            with pytest.raises(OverloadedError, match="2 streams"):
                async with p.stream("unary") as stream:
                    await stream.result()
            nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_as_many_calls_as_the_limit_allows_run_at_once(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        running = most = 0
        everybody = trio.Event()

        @p.service.method
        async def meet(call: Call) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == MAX_CALLS_PER_PEER:
                everybody.set()
            await everybody.wait()
            running -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_CALLS_PER_PEER):
                nursery.start_soon(p.call, "meet")
            await trio.sleep(0.015)
            with pytest.raises(OverloadedError):
                await p.call("meet")
        assert most == MAX_CALLS_PER_PEER


async def test_large_arguments_of_a_peers_running_calls_share_one_budget(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(Limits(max_received_bytes_per_peer=1_500_000)) as p:
        p.add_echo()

        @p.service.method
        async def hold(call: Call, data: bytes) -> int:
            await trio.sleep(5)
            return len(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.call, "hold", bytes(900_000))
            await trio.sleep(1)
            started = trio.current_time()
            with pytest.raises(OverloadedError, match="arguments") as caught:
                await p.call("echo", bytes(900_000))
            assert (caught.value.method, caught.value.peer) == ("s.echo", p.bob.peer_id)
            assert caught.value.retry_after > 0
            with pytest.raises(OverloadedError):
                await p.call("echo", ["x" * 1000] * 900)  # all of it in the frame's array
            async with p.stream("echo", bytes(900_000)) as stream:
                await stream.send(bytes(900_000))  # dropped as well
                with pytest.raises(OverloadedError):
                    await stream.result()
            assert await p.call("echo", bytes(500_000)) == bytes(500_000)
            assert await p.call("echo", 1) == 1
            assert trio.current_time() - started < 1  # the streams serve on
            assert p.bob_streams() == 2
        assert await p.call("echo", bytes(900_000)) == bytes(900_000)


@pytest.mark.parametrize("size", [16_000, 20_000, 60_000, 70_000, 300_000, 3_000_000])
async def test_arguments_and_items_of_any_size_cross(size: int, pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        p.add_echo()

        @p.service.method
        async def back(call: Call, first: Any) -> AsyncIterator[Any]:
            yield first
            async for item in call.items:
                yield item

        for value in (random.Random(size).randbytes(size), ["x" * 100] * (size // 100)):
            assert await p.call("echo", value) == value
            async with p.stream("back", value) as stream:
                assert await stream.__anext__() == value
                for _ in range(3):
                    await stream.send(value)
                    assert await stream.__anext__() == value


async def test_a_refused_argument_is_never_held(pair: Any, autojump_clock: object) -> None:
    size = 30_000_000
    async with pair(Limits(max_received_bytes_per_peer=1_000_000)) as p:
        p.add_echo()

        @p.service.method
        async def hold(call: Call, data: bytes) -> None:
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.call, "hold", bytes(900_000))
            await trio.sleep(1)
            stream = await p.alice.open_stream(p.bob.peer_id, [RPC])
            parts = pack(Request("s.echo", [bytes(size)], None, "", False))
            tracemalloc.start()
            try:
                for part in parts:
                    await stream.send_all(part)
                answer = await stream.receive_some()
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert b"OverloadedError" in answer
            assert peak < size / 10
            nursery.cancel_scope.cancel()


async def test_forged_lengths_reserve_no_memory(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        p.add_echo()
        streams = [await p.alice.open_stream(p.bob.peer_id, [RPC]) for _ in range(100)]
        tracemalloc.start()
        try:
            for stream in streams:
                await stream.send_all(varint(20) + varint(60 << 20) + b"\x96\x00" + bytes(1000))
            await trio.sleep(1)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 << 20
        assert await p.call("echo", 1) == 1


async def test_large_items_wait_for_each_other_and_none_is_lost(pair: Any, autojump_clock: object) -> None:
    async with pair(Limits(max_received_bytes_per_peer=1_500_000)) as p:

        @p.service.method
        async def count(call: Call, held: bytes) -> int:
            return sum([len(item) async for item in call.items])

        totals = []

        async def one() -> None:
            async with p.stream("count", bytes(300_000)) as stream:
                for _ in range(3):
                    await stream.send(bytes(900_000))
                totals.append(await stream.result())

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one)
        assert totals == [2_700_000] * 4


async def test_an_oversize_argument_fails_before_anything_is_sent(pair: Any, autojump_clock: object) -> None:
    async with pair(callers=Limits(max_argument_bytes=100_000)) as p:
        p.add_echo()
        assert await p.call("echo", 1) == 1
        started = trio.current_time()
        with pytest.raises(
            LocalProtocolError, match=r"limit of 100000; larger values belong in a blob or a stream"
        ):
            await p.call("echo", bytes(100_000))
        with pytest.raises(LocalProtocolError, match="limit of 100000"):
            async with p.stream("echo", "x" * 100_000):
                pass
        assert trio.current_time() == started
        async with p.stream("echo", 1) as stream:
            with pytest.raises(LocalProtocolError, match="limit of 100000"):
                await stream.send(bytes(100_000))
        assert await p.call("echo", bytes(99_000)) == bytes(99_000)


async def test_an_oversize_reply_is_an_error_and_the_stream_serves_on(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(Limits(max_reply_bytes=100_000)) as p:
        p.add_echo()

        @p.service.method
        async def grow(call: Call) -> AsyncIterator[bytes]:
            yield bytes(1000)
            yield bytes(200_000)

        with pytest.raises(RemoteError, match=r"limit of 100000; larger values belong in a blob or a stream"):
            await p.call("echo", bytes(100_000))
        started = trio.current_time()
        assert await p.call("echo", 2) == 2
        assert trio.current_time() - started == pytest.approx(0.02)
        got = []
        with pytest.raises(RemoteError, match="limit of 100000"):
            async with p.stream("grow") as items:
                async for item in items:
                    got.append(len(item))
        assert got == [1000]


async def test_a_reply_over_the_callers_limit_breaks_its_stream_and_no_other(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(callers=Limits(max_reply_bytes=100_000)) as p:
        p.add_echo()
        with pytest.raises(RemoteProtocolError, match="limit of 100000") as caught:
            await p.call("echo", bytes(200_000))
        assert caught.value.peer == p.bob.peer_id
        assert await p.call("echo", bytes(90_000)) == bytes(90_000)


async def test_a_burst_of_calls_is_answered_and_the_next_one_opens_no_stream(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(callers=Limits(max_pooled_streams=20)) as p:
        answered = []

        @p.service.method
        async def work(call: Call, n: int) -> int:
            await trio.sleep(0.1)
            return n

        async def one(n: int) -> None:
            answered.append(await p.call("work", n))

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for n in range(300):
                    nursery.start_soon(one, n)
            assert p.bob_streams() == 300
        assert sorted(answered) == sorted([*range(300)] * 2)
        await trio.sleep(25)
        assert p.bob_streams() == 20
        assert await p.call("work", 1) == 1
