"""Calls of every shape between two hosts of a MemoryNetwork, under a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import trio

from lattica.rpc import Call, Service
from lattica.telemetry import current_trace
from lattica.testing import MemoryNetwork, endpoint


async def test_unary_call_returns_what_the_handler_returns(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def hello(call: Call, name: str) -> str:
            return f"hello {name} at {call.peer}, says {call.local} of {call.method}"

        said = await p.call("hello", "Ada")
        assert said == f"hello Ada at {p.alice.peer_id}, says {p.bob.peer_id} of s.hello"


async def test_server_stream_gives_items_in_order(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def count(call: Call, n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

        async with p.stream("count", 1000) as items:
            assert [item async for item in items] == list(range(1000))


async def test_client_stream_gives_its_items_to_the_handler(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def total(call: Call) -> int:
            return sum([item async for item in call.items])

        async with p.stream("total") as stream:
            await stream.send(1)
            await stream.send(2)
            await stream.finish()
            assert await stream.result() == 3


async def test_items_flow_both_ways_at_once(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def double(call: Call) -> AsyncIterator[int]:
            async for item in call.items:
                yield 2 * item

        async with p.stream("double") as stream:
            for i in range(10):
                await stream.send(i)
                assert await stream.__anext__() == 2 * i
            assert await stream.result() is None


async def test_tensors_arrive_as_read_only_arrays_in_aligned_memory(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        seen: list[Any] = []

        @p.service.method
        async def negate(call: Call, array: Any) -> Any:
            seen.append(array)
            return -array

        sent = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
        back = await p.call("negate", sent)
        assert back.dtype == np.float32
        assert (back == -sent).all()
        for array in (back, seen[0]):
            assert not array.flags.writeable
            assert not array.flags.owndata
            assert array.ctypes.data % 64 == 0


async def test_a_handler_that_sleeps_delays_no_other_call(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def sleep(call: Call, seconds: float) -> float:
            await trio.sleep(seconds)
            return seconds

        order: list[float] = []

        async def one(seconds: float) -> None:
            order.append(await p.call("sleep", seconds))

        async with trio.open_nursery() as nursery:
            for seconds in (5.0, 0.5, 3.0):
                nursery.start_soon(one, seconds)
        assert order == [0.5, 3.0, 5.0]


async def test_a_pooled_stream_saves_its_negotiation(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def nothing(call: Call) -> None: ...

        took = []
        for _ in range(2):
            started = trio.current_time()
            await p.call("nothing")
            took.append(trio.current_time() - started)
        assert took == pytest.approx([0.04, 0.02])  # two round trips, then one


async def test_the_trace_crosses_the_wire_and_every_hop(autojump_clock: object) -> None:
    async with MemoryNetwork(seed=1) as network:
        hosts = [network.host(name) for name in ("alice", "bob", "carol")]
        rpcs = [endpoint(host) for host in hosts]
        service, traces = Service("s"), []
        for host, following in pairwise(hosts):
            await host.connect(following.addresses[0])

        @service.method
        async def hop(call: Call, left: int) -> None:
            traces.append((call.trace, current_trace.get()))
            if left:
                await rpcs[1].call(hosts[2].peer_id, "s.hop", left - 1)

        for rpc in rpcs[1:]:
            rpc.register(service)
        token = current_trace.set("00ff00ff00ff00ff")
        await rpcs[0].call(hosts[1].peer_id, "s.hop", 1)
        current_trace.reset(token)
        assert traces == [("00ff00ff00ff00ff", "00ff00ff00ff00ff")] * 2
        await rpcs[0].call(hosts[1].peer_id, "s.hop", 1)
        assert traces[2] == traces[3] != traces[0]


async def test_a_peer_may_be_named_by_text(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def nothing(call: Call) -> None: ...

        assert await p.rpc.call(str(p.bob.peer_id), "s.nothing") is None


async def test_a_unary_call_gives_its_handler_no_items(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def total(call: Call) -> int:
            return sum([item async for item in call.items])

        assert await p.call("total") == 0


async def test_a_stream_of_a_unary_method_has_a_result_and_no_items(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:

        @p.service.method
        async def one(call: Call) -> int:
            return 1

        async with p.stream("one") as stream:
            assert [item async for item in stream] == []
            assert await stream.result() == 1
            assert await stream.result() == 1


async def test_both_sides_may_call_each_other_over_one_connection(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        back, mine = endpoint(p.bob, "/lattica/back"), Service("mine")
        endpoint(p.alice, "/lattica/back").register(mine)

        @mine.method
        async def name(call: Call) -> str:
            return "alice"

        @p.service.method
        async def who(call: Call) -> Any:
            assert call.peer is not None
            return await back.call(call.peer, "mine.name")

        assert await p.call("who") == "alice"
        assert len(p.alice.peers()) == len(p.bob.peers()) == 1


async def test_a_handler_that_reads_only_some_items_still_answers(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def first(call: Call) -> Any:
            return await call.items.__anext__()

        async with p.stream("first") as stream:
            for i in range(100):
                await stream.send([i, bytes(100_000)])  # more than the window, and more than is read ahead
            assert (await stream.result())[0] == 0
        async with p.stream("first") as stream:
            await stream.send("again")
            assert await stream.result() == "again"
