"""What a node's metrics tell of calls."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from lattica.errors import DeadlineError, NoSuchMethodError, RemoteError
from lattica.protocols import RPC
from lattica.rpc import Call, Limits
from lattica.rpc.metrics import MAX_CODES, MAX_METHODS, OTHER, CallMetrics, CallStats
from lattica.telemetry import Metrics


def shown(p: Any) -> dict[str, tuple[Metrics, Metrics]]:
    found = {}
    for name, rpc in (("alice", p.rpc), ("bob", p.served)):
        found[name] = Metrics()
        rpc.show(CallMetrics(found[name].registry), RPC)
    return found


def value(metrics: Any, name: str, side: str, method: str, **labels: str) -> float | None:
    found: float | None = metrics.registry.get_sample_value(
        f"lattica_rpc_{name}", {"protocol": RPC, "side": side, "method": method, **labels}
    )
    return found


async def test_calls_are_counted_on_both_sides_with_their_durations(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        metrics = shown(p)

        @p.service.method
        async def sleep(call: Call, seconds: float) -> None:
            await trio.sleep(seconds)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(p.call, "sleep", 2)
            await trio.sleep(1)
            for name, side in (("alice", "caller"), ("bob", "handler")):
                assert value(metrics[name], "calls_in_flight", side, "s.sleep") == 3
        for name, side, trip in (("alice", "caller", 0.04), ("bob", "handler", 0)):
            assert value(metrics[name], "calls_in_flight", side, "s.sleep") == 0
            assert value(metrics[name], "call_seconds_count", side, "s.sleep") == 3
            assert value(metrics[name], "call_seconds_sum", side, "s.sleep") == pytest.approx(6 + 3 * trip)
            assert value(metrics[name], "call_seconds_bucket", side, "s.sleep", le="1.0") == 0
            assert value(metrics[name], "call_seconds_bucket", side, "s.sleep", le="2.5") == 3


async def test_errors_are_counted_by_their_class(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        metrics = shown(p)
        p.add_sleeper()

        @p.service.method
        async def fail(call: Call) -> None:
            raise KeyError

        with pytest.raises(RemoteError):
            await p.call("fail")
        with pytest.raises(DeadlineError):
            await p.call("unary", timeout=1)
        with trio.move_on_after(1):
            await p.call("unary")
        for _ in range(2):
            with pytest.raises(NoSuchMethodError):
                await p.call(secrets.token_hex(4))
        await trio.sleep(1)
        for name, side in (("alice", "caller"), ("bob", "handler")):
            assert value(metrics[name], "errors_total", side, "s.fail", code="KeyError") == 1
            assert value(metrics[name], "errors_total", side, "s.unary", code="DeadlineError") == 1
            assert value(metrics[name], "errors_total", side, "s.unary", code="Cancelled") == 1
        # What peers ask for makes no rows.
        assert value(metrics["bob"], "errors_total", "handler", OTHER, code="NoSuchMethodError") == 2


async def test_refused_calls_are_counted(pair: Any, autojump_clock: object) -> None:
    async with pair(Limits(max_calls_per_peer=0)) as p:
        metrics = shown(p)
        p.add_echo()
        with pytest.raises(Exception, match="try again later"):
            await p.call("echo", 1)
        assert value(metrics["bob"], "errors_total", "handler", "s.echo", code="OverloadedError") == 1
        assert value(metrics["bob"], "calls_in_flight", "handler", "s.echo") == 0


async def test_bytes_are_counted_in_both_directions(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        metrics = shown(p)
        p.add_echo()

        @p.service.method
        async def sizes(call: Call) -> AsyncIterator[bytes]:
            async for item in call.items:
                yield bytes(item)

        await p.call("echo", bytes(10_000))
        async with p.stream("sizes") as stream:
            await stream.send(200_000)
            await stream.finish()
            assert [len(item) async for item in stream] == [200_000]
        for method, up, down in (("s.echo", 10_000, 10_000), ("s.sizes", 0, 200_000)):
            for name, side, direction, size in (
                ("alice", "caller", "sent", up),
                ("bob", "handler", "received", up),
                ("alice", "caller", "received", down),
                ("bob", "handler", "sent", down),
            ):
                counted = value(metrics[name], "bytes_total", side, method, direction=direction)
                assert counted is not None
                assert size < counted < size + 100


def test_rows_are_bounded_whatever_names_and_errors_come() -> None:
    stats = CallStats()
    for n in range(2 * MAX_METHODS):
        stats.of(f"s.m{n}").failed("KeyError")
    assert len(stats.methods) <= MAX_METHODS + 1
    assert stats.methods[OTHER].errors == {"KeyError": MAX_METHODS}
    for n in range(2 * MAX_CODES):
        stats.of("s.m0").failed(f"Error{n}")
    assert len(stats.of("s.m0").errors) == MAX_CODES + 1
