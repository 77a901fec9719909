"""Callers and handlers of unequal speed, and calls that are given up half way: what they cost, and whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count, pairwise
from typing import Any

import pytest
import trio

from lattica.errors import (
    DeadlineError,
    NetworkError,
    OverloadedError,
    RemoteError,
    RemoteProtocolError,
    StreamError,
)
from lattica.protocols import RPC
from lattica.rpc import Call, Service
from lattica.rpc.call import End, pack
from lattica.testing import MemoryNetwork, endpoint


async def test_a_stalled_reader_loses_nothing_and_stops_nothing_else(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        p.add_echo()

        @p.service.method
        async def produce(call: Call) -> AsyncIterator[Any]:
            for n in range(500):
                yield [n, bytes(10_000)]

        async with p.stream("produce") as items:
            got = [(await items.__anext__())[0]]
            for hour in range(3):
                await trio.sleep(3600)
                started = trio.current_time()
                assert await p.call("echo", hour) == hour
                assert trio.current_time() - started < 0.1
                got.append((await items.__anext__())[0])
            got += [n async for n, _ in items]
        assert got == list(range(500))


async def test_a_stalled_handler_loses_nothing_and_stops_nothing_else(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        p.add_echo()

        @p.service.method
        async def take_late(call: Call) -> list[int]:
            await trio.sleep(3 * 3600)
            return [n async for n, _ in call.items]

        async with p.stream("take_late") as stream:

            async def send() -> None:
                for n in range(500):
                    await stream.send([n, bytes(10_000)])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                for hour in range(3):
                    await trio.sleep(3000)
                    started = trio.current_time()
                    assert await p.call("echo", hour) == hour
                    assert trio.current_time() - started < 0.1
            assert await stream.result() == list(range(500))


async def test_an_abandoned_stream_stops_a_producer_that_never_waits(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        ended: list[float] = []

        @p.service.method
        async def produce(call: Call) -> AsyncIterator[Any]:
            try:
                for n in count():
                    yield [n, bytes(1000)]
            finally:
                ended.append(trio.current_time())

        for size in (1, 100, 1000):
            async with p.stream("produce") as items:
                for _ in range(size):
                    await items.__anext__()
            left = trio.current_time()
            await trio.sleep(2)
            assert ended.pop() - left <= 2


async def test_a_generator_that_never_waits_lets_others_run(pair: Any, autojump_clock: object) -> None:
    async with pair(window_bytes=100_000_000) as p:
        made = 0
        seen: list[int] = []
        began = trio.Event()

        @p.service.method
        async def produce(call: Call) -> AsyncIterator[int]:
            nonlocal made
            began.set()
            for made in range(5_000):
                yield made

        async def look() -> None:
            await began.wait()
            while made < 4_999:  # no time passes meanwhile: the generator waits for nothing
                seen.append(made)
                await trio.lowlevel.checkpoint()

        async with p.stream("produce") as items, trio.open_nursery() as nursery:
            nursery.start_soon(look)
            assert [item async for item in items] == list(range(5_000))
        assert max(later - earlier for earlier, later in pairwise(seen)) <= 64


async def test_200_calls_cancelled_in_mid_write_leave_the_connection_usable(
    pair: Any, autojump_clock: object
) -> None:
    async with pair(bandwidth=10e6) as p:
        p.add_echo()
        lost: list[object] = []
        p.alice.watch(lambda peer, connected: lost.append(peer))
        for round_ in range(10):
            async with trio.open_nursery() as nursery:
                for n in range(20):

                    async def one(after: float) -> None:
                        with trio.move_on_after(after):
                            await p.call("echo", bytes(1_000_000))
                            raise AssertionError("too fast to be cancelled")

                    nursery.start_soon(one, 0.05 + n * 0.003 + round_ * 0.0007)
        assert await p.call("echo", "after", timeout=5) == "after"
        assert await p.call("echo", bytes(1_000_000), timeout=5) == bytes(1_000_000)
        assert lost == []
        await trio.sleep(20)
        load = p.served._server.load_of(p.alice.peer_id)
        assert (load.calls, load.arguments.used, load.items.used) == (0, 0, 0)
        assert load.streams <= 2


@pytest.mark.parametrize("timeout", [0.3, 2, 30])
@pytest.mark.parametrize("stalls", ["handler", "request", "items", "network"])
async def test_a_callers_timeout_is_kept_within_20_percent(
    timeout: float, stalls: str, pair: Any, autojump_clock: object
) -> None:
    async with pair(bandwidth=1e5 if stalls == "request" else 1e9, break_after=60) as p:
        sleeper = p.add_sleeper()
        p.add_echo()
        assert await p.call("echo", 1) == 1
        started = trio.current_time()
        with pytest.raises(DeadlineError):
            if stalls == "request":
                await p.call("echo", bytes(10_000_000), timeout=timeout)
            elif stalls == "items":
                async with p.stream("items", timeout=timeout) as items:
                    assert [item async for item in items] == []
            else:
                if stalls == "network":
                    p.network.partition([p.alice], [p.bob])
                await p.call("unary", timeout=timeout)
        assert 0.999 * timeout <= trio.current_time() - started <= 1.2 * timeout
        p.network.heal()
        await trio.sleep(1)
        assert len(sleeper.cancelled) == len(sleeper.began)
        assert await p.call("echo", 2, timeout=5) == 2


async def test_what_is_left_of_a_deadline_shrinks_at_each_of_three_hops(autojump_clock: object) -> None:
    async with MemoryNetwork(seed=1, latency=0.1) as network:
        hosts = [network.host(name) for name in ("alice", "bob", "carol", "dave")]
        rpcs = [endpoint(host) for host in hosts]
        service, left, cancelled = Service("s"), [], []
        for host, following in pairwise(hosts):
            await host.connect(following.addresses[0])

        @service.method
        async def hop(call: Call, at: int) -> None:
            left.append(call.remaining())
            try:
                await trio.sleep(1)
                if at == 3:
                    await trio.sleep_forever()
                await rpcs[at].call(hosts[at + 1].peer_id, "s.hop", at + 1, timeout=60)
            finally:
                cancelled.append((at, trio.current_time()))

        for rpc in rpcs[1:]:
            rpc.register(service)
        started = trio.current_time()
        with pytest.raises(DeadlineError):
            await rpcs[0].call(hosts[1].peer_id, "s.hop", 1, timeout=10)
        assert trio.current_time() - started == pytest.approx(10)
        await trio.sleep(1)
        # Each hop opens a stream first, which takes a round trip, and each handler sleeps a second.
        assert left == [pytest.approx(9.8), pytest.approx(8.6), pytest.approx(7.4)]
        assert sorted(at for at, _ in cancelled) == [1, 2, 3]
        assert all(when - started <= 10.5 for _, when in cancelled)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        StreamError("a stream of the handler's own"),
        NetworkError("its network"),
        DeadlineError("its deadline"),
        OverloadedError("busy"),
        RemoteProtocolError("somebody else's bytes"),
        SystemExit(1),
        KeyError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_failing_handler_runs_once_even_if_it_may_run_twice(
    error: BaseException, pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        runs = []

        @p.service.method
        async def fail(call: Call) -> None:
            runs.append(call)
            raise error

        with pytest.raises((RemoteError, DeadlineError, OverloadedError)) as caught:
            await p.call("fail", idempotent=True)
        assert caught.value.method == "s.fail"
        assert len(runs) == 1
        with pytest.raises((RemoteError, DeadlineError, OverloadedError)):
            async with p.stream("fail") as stream:
                await stream.result()
        assert len(runs) == 2


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        pytest.param(b"", 2, id="lost before an answer"),
        pytest.param(b"".join(pack(End("yes")))[:-2], 2, id="lost in the middle of one"),
        pytest.param(b"\x02\x00\x91\x07", 1, id="garbage"),
        pytest.param(b"\xff" * 10, 1, id="no frame"),
    ],
)
async def test_only_a_lost_stream_is_a_reason_to_call_again(
    answer: bytes, calls: int, pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        requests = []

        async def break_off(stream: Any) -> None:
            requests.append(await stream.receive_some())
            await stream.send_all(answer)
            await trio.sleep(1)

        p.bob.unserve(RPC)
        p.bob.serve(RPC, break_off)
        with pytest.raises((StreamError, RemoteProtocolError)):
            await p.call("hello", idempotent=True)
        assert len(requests) == calls
        with pytest.raises((StreamError, RemoteProtocolError)):
            await p.call("hello")
        assert len(requests) == calls + 1
