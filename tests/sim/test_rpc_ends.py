"""How calls end early: deadlines, cancellation, lost connections; and what flows too fast or too much."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from lattica.errors import (
    DeadlineError,
    DialError,
    NetworkError,
    StreamError,
    UnreachableError,
)
from lattica.ids import PeerId
from lattica.protocols import RPC
from lattica.rpc import Call, Rpc, Service
from lattica.testing import MemoryNetwork, endpoint


async def test_a_deadline_is_kept_on_both_sides(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        sleeper = p.add_sleeper()
        with pytest.raises(DeadlineError) as caught:
            await p.call("unary", timeout=2.5)
        assert trio.current_time() == pytest.approx(2.52)  # 0.02 for the connection
        assert str(caught.value) == f"s.unary on {p.bob.peer_id} did not finish within 2.5 s"
        assert (caught.value.method, caught.value.peer) == ("s.unary", p.bob.peer_id)
        await trio.sleep(0.02)
        assert sleeper.cancelled == [pytest.approx(2.52, abs=0.011)]


async def test_a_deadline_covers_the_dial(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        await p.alice.disconnect(p.bob.peer_id)
        p.network.partition([p.alice], [p.bob])
        started = trio.current_time()
        with pytest.raises(DeadlineError, match="within 3 s"):
            await p.call("unary", timeout=3)
        assert trio.current_time() - started == pytest.approx(3)


async def test_a_stream_has_a_deadline_for_its_whole_block(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        sleeper = p.add_sleeper()
        got = []
        with pytest.raises(DeadlineError, match=r"s\.items"):
            async with p.stream("items", timeout=2) as items:
                async for item in items:
                    got.append(item)
        assert got == [1]
        await trio.sleep(0.02)
        assert len(sleeper.cancelled) == 1


async def test_a_handlers_own_calls_end_by_its_deadline(autojump_clock: object) -> None:
    async with MemoryNetwork(seed=1, latency=0.01) as network:
        hosts = [network.host(name) for name in ("alice", "bob", "carol")]
        rpcs = [endpoint(host) for host in hosts]
        await hosts[0].connect(hosts[1].addresses[0])
        await hosts[1].connect(hosts[2].addresses[0])
        near, far, remaining = Service("near"), Service("far"), []

        @near.method
        async def forward(call: Call, timeout: float | None) -> Any:
            return await rpcs[1].call(hosts[2].peer_id, "far.wait", timeout=timeout)

        @near.method
        async def later(call: Call) -> None:
            background.start_soon(after)

        async def after() -> None:
            await trio.sleep(5)  # the call, and its deadline, are over
            await rpcs[1].call(hosts[2].peer_id, "far.note")
            noted.set()

        @far.method
        async def wait(call: Call) -> None:
            remaining.append(call.remaining())
            await trio.sleep_forever()

        @far.method
        async def note(call: Call) -> None:
            remaining.append(call.remaining())

        rpcs[1].register(near)
        rpcs[2].register(far)
        for timeout, seen in [(30, 2 - 0.05), (None, 2 - 0.03), (1, 1 - 0.01)]:
            with pytest.raises(DeadlineError):
                await rpcs[0].call(hosts[1].peer_id, "near.forward", timeout, timeout=2)
            await trio.sleep(1)
            assert remaining.pop() == pytest.approx(seen, abs=0.03)
        noted = trio.Event()
        async with trio.open_nursery() as background:
            await rpcs[0].call(hosts[1].peer_id, "near.later", timeout=1)
            await noted.wait()
        assert remaining == [pytest.approx(30 - 0.01, abs=0.03)]


@pytest.mark.parametrize("how", ["leave", "cancel", "raise", "abort"])
@pytest.mark.parametrize("method", ["unary", "items", "reads_one"])
async def test_whoever_stops_listening_cancels_the_handler(
    pair: Any, how: str, method: str, autojump_clock: object
) -> None:
    async with pair() as p:
        sleeper = p.add_sleeper()
        with trio.move_on_after(1) as scope:
            try:
                async with p.stream(method) as stream:
                    await stream.send(1)
                    if how == "cancel":
                        await trio.sleep_forever()
                    await trio.sleep(0.5)
                    if how == "raise":
                        raise ZeroDivisionError
                    if how == "abort":
                        stream.abort()
            except ZeroDivisionError:
                assert how == "raise"
        assert scope.cancelled_caught == (how == "cancel")
        left = trio.current_time()
        await trio.sleep(0.02)
        assert sleeper.cancelled == [pytest.approx(left + 0.01)]  # one latency later


async def test_a_cancelled_unary_call_cancels_its_handler(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        sleeper = p.add_sleeper()
        with trio.move_on_after(1):
            await p.call("unary")
        await trio.sleep(0.02)
        assert sleeper.cancelled == [pytest.approx(1.03)]


async def test_a_caller_that_leaves_is_noticed_behind_its_unread_items(
    pair: Any, autojump_clock: object
) -> None:
    """The handler reads nothing, so the stream is not read either, and a reset does not show by itself."""
    async with pair() as p:
        sleeper = p.add_sleeper()
        with trio.move_on_after(1):
            async with p.stream("unary") as stream:
                while True:
                    await stream.send(bytes(50_000))
        await trio.sleep(6)
        assert len(sleeper.cancelled) == 1


async def test_a_cancelled_call_costs_its_stream_and_no_other(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        p.add_sleeper()

        @p.service.method
        async def echo(call: Call, value: int) -> int:
            return value

        for i in range(3):
            with trio.move_on_after(0.5):
                await p.call("unary")
            assert await p.call("echo", i) == i


async def test_a_lost_connection_fails_the_call_and_cancels_the_handler(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        sleeper = p.add_sleeper()

        async def cut() -> None:
            await trio.sleep(1)
            p.network.cut(p.alice, p.bob)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with pytest.raises(StreamError, match=r"s\.unary on 12D3"):
                await p.call("unary")
        await trio.sleep(0.1)
        assert len(sleeper.began) == len(sleeper.cancelled) == 1


@pytest.mark.parametrize(("idempotent", "runs"), [(False, 1), (True, 2)])
async def test_only_idempotent_calls_are_made_again_after_a_loss(
    pair: Any, idempotent: bool, runs: int, autojump_clock: object
) -> None:
    async with pair() as p:
        began = []

        @p.service.method
        async def fragile(call: Call) -> str:
            began.append(call)
            if len(began) == 1:
                p.network.cut(p.alice, p.bob)
                await trio.sleep_forever()
            return "done"

        if idempotent:
            assert await p.call("fragile", idempotent=True) == "done"
        else:
            with pytest.raises(NetworkError):
                await p.call("fragile")
        assert len(began) == runs


async def test_an_idempotent_call_is_made_twice_at_most(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        began = []

        @p.service.method
        async def fragile(call: Call) -> None:
            began.append(call)
            p.network.cut(p.alice, p.bob)
            await trio.sleep_forever()

        with pytest.raises(StreamError):
            await p.call("fragile", idempotent=True)
        assert len(began) == 2


async def test_a_call_after_a_loss_redials_by_itself(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def echo(call: Call, value: int) -> int:
            return value

        assert await p.call("echo", 1) == 1
        p.network.cut(p.alice, p.bob)
        assert await p.call("echo", 2) == 2
        p.bob.stop()
        with pytest.raises(DialError):
            await p.call("echo", 3)


async def test_an_idle_stream_that_died_unnoticed_fails_no_call(autojump_clock: object) -> None:
    async with MemoryNetwork(seed=1, latency=0.01) as network:
        alice, bob = network.host("alice"), network.host("bob")
        await alice.connect(bob.addresses[0])
        service, served = Service("s"), endpoint(bob)
        served.register(service)

        @service.method
        async def echo(call: Call, value: int) -> int:
            return value

        async def open_stream(peer: PeerId) -> Any:
            return await alice.open_stream(peer, [RPC])

        rpc = Rpc(local=alice.peer_id, open_stream=open_stream)  # nobody tells it of lost connections
        assert await rpc.call(bob.peer_id, "s.echo", 1) == 1
        network.cut(alice, bob)
        await trio.sleep(1.5)
        assert await rpc.call(bob.peer_id, "s.echo", 2) == 2
        await trio.sleep(1.5)
        assert await rpc.call(bob.peer_id, "s.echo", 3) == 3


async def test_a_peer_without_an_address_is_unreachable(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        with pytest.raises(UnreachableError, match="no address"):
            await p.rpc.call(p.network.host("carol").peer_id, "s.echo")
