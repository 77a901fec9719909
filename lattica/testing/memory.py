"""A network of hosts in one process: latency, bandwidth, loss, partitions, windows, by trio's clock and one seed.

Under a `trio.testing.MockClock` a test runs as fast as the processor allows and the same way each time. What
is modelled: connections between pairs of hosts, as TCP gives them. Lost packets cost a retransmission and
hold back what is behind them on the same connection; a partition holds everything back, until `heal`, or
until the connection breaks after `break_after` seconds. Streams of a connection share its bandwidth in turns, a
frame each, and queue and window bound what each of them may hold, as on a real connection: a reader that stops
stops its writer and nobody else.
"""

from __future__ import annotations

import contextvars
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import combinations, product
from random import Random
from typing import Any, Self

import trio

from lattica.errors import DialError, LocalProtocolError
from lattica.ids import PeerId
from lattica.net.identity import Identity
from lattica.protocols import DIAL_TIMEOUT_SECONDS, KIB
from lattica.testing.hosts import Gate, MemoryConnection, MemoryHost
from lattica.testing.links import Link

Who = MemoryHost | PeerId | str


class MemoryNetwork:
    """A network in memory: `async with MemoryNetwork(seed=1, latency=0.05) as network`.

    Call it as `lattica.net.host.open_host` is called, or pass it as `network=` to `lattica.open_node`.

    Args:
        seed: decides the hosts' keys and which chunks are lost.
        latency: seconds, one way, between hosts for which `set_latency` says nothing else.
        bandwidth: bytes a second, each way, between hosts for which `set_bandwidth` says nothing else.
        loss: probability that a chunk (64 KiB at most) is lost once and sent again.
        window_bytes: how much of a stream may be on its way or unread.
        break_after: seconds that a connection survives in a partition.
        dial_timeout: seconds until a dial that nothing answers fails.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        latency: float = 0.0,
        bandwidth: float = math.inf,
        loss: float = 0.0,
        window_bytes: int = 256 * KIB,
        break_after: float = 15.0,
        dial_timeout: float = DIAL_TIMEOUT_SECONDS,
    ) -> None:
        self.window_bytes = window_bytes
        self.dial_timeout = dial_timeout
        self._seed = seed
        self._random = Random(seed)
        self._latency = latency
        self._latencies: dict[frozenset[PeerId], float] = {}
        self._bandwidth = bandwidth
        self._bandwidths: dict[frozenset[PeerId], float] = {}
        self._loss = loss
        self._break_after = break_after
        self._hosts: dict[PeerId, MemoryHost] = {}
        self._by_address: dict[str, MemoryHost] = {}
        self._connections: dict[frozenset[PeerId], MemoryConnection] = {}
        self._apart: set[frozenset[PeerId]] = set()
        # Handlers must not see the context variables of whoever opened their stream: a wire is in between.
        self._context = contextvars.copy_context()
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        # The nursery isn't told what was raised, so that it goes on as it is and not inside of a group.
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            try:
                await self._manager.__aexit__(None, None, None)
            finally:
                self._nursery = None

    def host(self, name: str) -> MemoryHost:
        """The host of this name, started on first use; its key follows from the name and the seed."""
        key = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=32).digest()
        identity = Identity(key)
        known = self._hosts.get(identity.peer_id)
        return known if known is not None else self._start(identity, name)

    def __call__(
        self,
        *,
        identity: Identity,
        listen: object = (),
        announce: object = (),
        gate: Gate | None = None,
        metrics: object = None,
    ) -> AbstractAsyncContextManager[MemoryHost]:
        """A host for a node, as an async context manager; its addresses are the network's own.

        It moves nothing on a wire, so it has nothing to count in `metrics`.
        """
        return asynccontextmanager(self._open)(identity, gate)

    async def _open(self, identity: Identity, gate: Gate | None) -> AsyncIterator[MemoryHost]:
        host = self._start(identity, f"node{len(self._by_address)}", gate)
        try:
            yield host
        finally:
            host.stop()

    def set_latency(self, a: Who, b: Who, seconds: float) -> None:
        """Change the latency between two hosts, one way; what is on its way keeps its time."""
        pair = self._pair(a, b)
        self._latencies[pair] = seconds
        if pair in self._connections:
            self._connections[pair].set(latency=seconds)

    def set_bandwidth(self, a: Who, b: Who, bytes_per_second: float) -> None:
        """Change the bandwidth between two hosts, each way; the frames that are being sent keep their time."""
        pair = self._pair(a, b)
        self._bandwidths[pair] = bytes_per_second
        if pair in self._connections:
            self._connections[pair].set(bandwidth=bytes_per_second)

    def partition(self, *groups: Iterable[Who]) -> None:
        """Let nothing pass between hosts of different groups, until `heal`.

        Connections stall, and break on both sides after `break_after` seconds; dials time out.
        """
        peers = [[self._peer(who) for who in group] for group in groups]
        pairs = {
            frozenset((a, b)) for one, other in combinations(peers, 2) for a, b in product(one, other)
        } - self._apart
        self._apart |= pairs
        for pair in pairs & self._connections.keys():
            self._connections[pair].stall()
            self.spawn(self._break_later, self._connections[pair], trio.current_time())

    def heal(self) -> None:
        """End all partitions; what they held back arrives."""
        self._apart.clear()
        for connection in self._connections.values():
            connection.resume()

    def cut(self, a: Who, b: Who) -> None:
        """Break the connection between two hosts now, both sides at once; they may dial again."""
        connection = self._connections.get(self._pair(a, b))
        if connection is not None:
            connection.lose("the connection was cut")

    def spawn(self, work: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Run something for as long as the network is there."""
        if self._nursery is None:
            raise LocalProtocolError(
                "the network is not entered; write `async with MemoryNetwork() as network`"
            )
        self._context.run(self._nursery.start_soon, work, *args)

    def spawn_if_open(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Run something while the network is there; nothing when it is gone already."""
        if self._nursery is not None:
            self.spawn(work)

    async def dial(self, host: MemoryHost, address: str) -> MemoryConnection:
        """Connect a host with the one at an address; the connection that there is, if there is one."""
        place, _, peer = address.partition("/p2p/")
        target = self._by_address.get(place)
        if target is host:
            raise DialError(f"{address} is our own address", attempts=[(address, "our own")])
        if target is None:
            await trio.lowlevel.checkpoint()
            raise DialError(f"nobody listens on {address}", attempts=[(address, "refused")])
        pair = frozenset((host.peer_id, target.peer_id))
        if pair in self._apart:
            await trio.sleep(self.dial_timeout)
        else:
            await trio.sleep(2 * self._latency_of(pair))
        if pair in self._apart or not target.is_running:
            raise DialError(f"{address} does not answer", attempts=[(address, "timed out")])
        if peer and peer != str(target.peer_id):
            raise DialError(f"{address} is {target.peer_id}", attempts=[(address, "another peer")])
        if pair not in self._connections:
            bandwidth = self._bandwidths.get(pair, self._bandwidth)
            links = [Link(self._latency_of(pair), self._loss, bandwidth, self._random) for _ in range(2)]
            self._connections[pair] = MemoryConnection(self, host, target, *links)
        return self._connections[pair]

    def drop(self, connection: MemoryConnection) -> None:
        """Forget a connection that is lost."""
        self._connections.pop(frozenset(connection.peers), None)

    def stop(self, host: MemoryHost) -> None:
        """Forget a host that has stopped."""
        self._hosts.pop(host.peer_id, None)
        self._by_address.pop(host.address, None)

    def _start(self, identity: Identity, name: str, gate: Gate | None = None) -> MemoryHost:
        self.spawn(trio.lowlevel.checkpoint)  # refuses where the network is not entered
        if identity.peer_id in self._hosts:
            raise LocalProtocolError(f"{identity.peer_id} has a host in this network already")
        host = MemoryHost(self, identity, name, gate)
        self._hosts[identity.peer_id] = self._by_address[host.address] = host
        return host

    def _latency_of(self, pair: frozenset[PeerId]) -> float:
        return self._latencies.get(pair, self._latency)

    def _peer(self, who: Who) -> PeerId:
        if isinstance(who, PeerId):
            return who
        return who.peer_id if isinstance(who, MemoryHost) else self.host(who).peer_id

    def _pair(self, a: Who, b: Who) -> frozenset[PeerId]:
        return frozenset((self._peer(a), self._peer(b)))

    async def _break_later(self, connection: MemoryConnection, since: float) -> None:
        await trio.sleep_until(since + self._break_after)
        if connection.stalled_since == since:
            connection.lose("the connection timed out")
