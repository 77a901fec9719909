"""Two hosts of a MemoryNetwork that call each other, for the tests of rpc."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from lattica.rpc import Call, ClientStream, Limits, Rpc, Service
from lattica.testing import MemoryHost, MemoryNetwork, endpoint


class Sleeper:
    """A service whose methods wait for ever, and note when they began and were cancelled."""

    def __init__(self, service: Service) -> None:
        self.began: list[float] = []
        self.cancelled: list[float] = []
        service.add("unary", self.unary)
        service.add("items", self.items)
        service.add("reads_one", self.reads_one)

    async def unary(self, call: Call) -> None:
        self.began.append(trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.append(trio.current_time())

    async def items(self, call: Call) -> AsyncIterator[int]:
        yield 1
        await self.unary(call)

    async def reads_one(self, call: Call) -> None:
        await call.items.__anext__()
        await self.unary(call)


@dataclass
class Pair:
    """Alice calls, Bob serves the service "s"."""

    network: MemoryNetwork
    alice: MemoryHost
    bob: MemoryHost
    rpc: Rpc
    served: Rpc
    service: Service

    async def call(self, method: str, *args: object, **options: Any) -> Any:
        return await self.rpc.call(self.bob.peer_id, f"s.{method}", *args, **options)

    def stream(self, method: str, *args: object, **options: Any) -> AbstractAsyncContextManager[ClientStream]:
        return self.rpc.stream(self.bob.peer_id, f"s.{method}", *args, **options)

    def add_sleeper(self) -> Sleeper:
        return Sleeper(self.service)

    def bob_streams(self) -> int:
        """How many streams of Alice's are open at Bob."""
        load = self.served._server.load_of(self.alice.peer_id)
        return 0 if load is None else load.streams

    def add_echo(self) -> None:
        async def echo(call: Call, value: Any) -> Any:
            return value

        self.service.add("echo", echo)


@asynccontextmanager
async def _pair(
    limits: Limits | None = None, *, callers: Limits | None = None, **options: Any
) -> AsyncIterator[Pair]:
    async with MemoryNetwork(seed=1, latency=0.01, **options) as network:
        alice, bob = network.host("alice"), network.host("bob")
        rpc, served, service = endpoint(alice, limits=callers), endpoint(bob, limits=limits), Service("s")
        served.register(service)
        await alice.connect(bob.addresses[0])
        yield Pair(network, alice, bob, rpc, served, service)


@pytest.fixture
def pair() -> Callable[..., AbstractAsyncContextManager[Pair]]:
    """`async with pair(limits, callers=limits, **options) as p`: options are MemoryNetwork's.

    `limits` are Bob's, `callers` Alice's. One way takes 10 ms.
    """
    return _pair
