"""Plain functions as handlers: in threads, so many at once, left to themselves when their call ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio

from lattica.errors import DeadlineError, RemoteError
from lattica.rpc.outside import MAX_HANDLER_THREADS
from lattica.rpc.service import Call, Service
from lattica.testing import MemoryNetwork, endpoint


async def test_so_many_threads_run_at_once_and_the_others_wait() -> None:
    go, lock = threading.Event(), threading.Lock()
    running = most = 0
    service = Service("work")

    @service.method
    def block(call: Call) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == MAX_HANDLER_THREADS:
                go.set()
        go.wait(20)
        with lock:
            running -= 1

    async with MemoryNetwork() as network:
        alice, bob = network.host("alice"), network.host("bob")
        caller, server = endpoint(alice), endpoint(bob)
        server.register(service)
        await alice.connect(bob.addresses[0])
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_HANDLER_THREADS + 20):
                nursery.start_soon(caller.call, bob.peer_id, "work.block")
    assert most == MAX_HANDLER_THREADS


async def test_a_thread_that_outlives_its_call_delays_nobody() -> None:
    go = threading.Event()
    service = Service("work")

    @service.method
    def block(call: Call) -> None:
        go.wait(20)

    @service.method
    def hello(call: Call) -> str:
        return "hello"

    @service.method
    def fail(call: Call) -> Iterator[int]:
        yield 1
        raise ValueError("half way")

    async with MemoryNetwork() as network:
        alice, bob = network.host("alice"), network.host("bob")
        caller, server = endpoint(alice), endpoint(bob)
        server.register(service)
        await alice.connect(bob.addresses[0])
        with pytest.raises(DeadlineError):
            await caller.call(bob.peer_id, "work.block", timeout=0.05)
        assert await caller.call(bob.peer_id, "work.hello") == "hello"
        with pytest.raises(RemoteError, match="half way"):
            async with caller.stream(bob.peer_id, "work.fail") as items:
                assert await anext(items) == 1
                await anext(items)
        go.set()
