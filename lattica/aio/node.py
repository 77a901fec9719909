"""What a node offers, as asyncio's coroutines, iterators and context managers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from lattica.aio.bridge import Bridge
from lattica.aio.handlers import in_asyncio
from lattica.background import Background, Held, take_items
from lattica.config import NodeConfig
from lattica.dht.records import Record
from lattica.dht.service import DEFAULT_TTL_SECONDS, Records
from lattica.errors import LocalProtocolError
from lattica.ids import PeerId
from lattica.net.api import Peer
from lattica.node import Mapping as NatMapping
from lattica.node import Node, Reachability
from lattica.protocols import DEFAULT_TIMEOUT_SECONDS
from lattica.rpc.service import ClientStream, Rpc, Service

T = TypeVar("T")
P = ParamSpec("P")


def open_node(config: NodeConfig | None = None) -> AsyncioNode:
    """A node for asyncio: `async with lattica.aio.open_node(config) as node`. Raises as `lattica.open_node` does."""
    return AsyncioNode(config)


class AsyncioNode:
    """A `lattica.Node` with asyncio methods under the same names. Made by `open_node`.

    What does not wait in a Node (`peers`, `addresses`, `rpc.register`) is a plain method here: it holds the loop
    for the time of a hand-over between threads.
    """

    def __init__(self, config: NodeConfig | None = None) -> None:
        self._config = config
        self._bridge: Bridge | None = None
        self.rpc: AsyncioRpc
        self.dht: AsyncioRecords

    async def __aenter__(self) -> Self:
        if self._bridge is not None:
            raise LocalProtocolError("a node is entered once; open another one")
        self._bridge = bridge = Bridge(self._config)
        bridge.background.start()
        try:
            await bridge.opened.wait(bridge.background.stop)
        except asyncio.CancelledError:
            await self._close()
            raise
        node = bridge.background.node
        if node is None:
            await self._close()
            raise bridge.background.failure or bridge.background.closed()
        self.rpc = AsyncioRpc(bridge, lambda: node.rpc)
        self.dht = AsyncioRecords(bridge, lambda: node.dht)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()
        failure = self._running.failure
        if error is None and failure is not None:
            raise failure

    # Who and where

    @property
    def config(self) -> NodeConfig:
        """Its settings."""
        return self._node.config

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        return self._node.peer_id

    @property
    def data_dir(self) -> Path | None:
        """Its folder, None when it touches no disk."""
        return self._node.data_dir

    @property
    def addresses(self) -> list[str]:
        """Dialable multiaddrs of this node, with `/p2p/`, no wildcards."""
        return self._running.read(lambda node: node.addresses)

    @property
    def reachability(self) -> Reachability:
        """Whether others can dial it."""
        return self._node.reachability

    @property
    def mapping(self) -> NatMapping:
        """What its NAT does."""
        return self._node.mapping

    @property
    def uptime_seconds(self) -> float:
        """Since the node was opened."""
        return self._running.read(lambda node: node.uptime_seconds)

    def peers(self) -> list[Peer]:
        """The peers that it is connected to."""
        return self._running.read(Node.peers)

    async def connect(self, address: str) -> PeerId:
        """As `Node.connect`."""
        node = self._node
        return await self._call(lambda: node.connect(address))

    async def online(self, timeout: float = 30.0) -> None:
        """As `Node.online`."""
        node = self._node
        await self._call(lambda: node.online(timeout))

    def endpoint(self, protocol: str) -> AsyncioRpc:
        """As `Node.endpoint`: calls under a protocol id of their own."""
        rpc = self._running.read(lambda node: node.endpoint(protocol))
        assert self._bridge is not None
        return AsyncioRpc(self._bridge, lambda: rpc)

    async def run(
        self, function: Callable[Concatenate[Node, P], Any], *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        """Run `function(node, ...)` on the node's thread, in trio; for what has no face here.

        An async function is awaited. A plain one must not wait.
        """
        node = self._node

        async def work() -> Any:
            value = function(node, *args, **kwargs)
            return await value if isinstance(value, Awaitable) else value

        return await self._call(work)

    # Inside

    @property
    def _running(self) -> Background:
        if self._bridge is None:
            raise LocalProtocolError(
                "the node is not open; write `async with lattica.aio.open_node(config) as node`"
            )
        return self._bridge.background

    @property
    def _node(self) -> Node:
        node = self._running.node
        if node is None:
            raise self._running.closed()
        return node

    async def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        assert self._bridge is not None
        return await self._bridge.call(work)

    async def _close(self) -> None:
        assert self._bridge is not None
        self._bridge.background.stop()
        await self._bridge.ended.wait(lambda: None)
        self._bridge.background.join()


class AsyncioRpc:
    """`node.rpc`: a `lattica.rpc.service.Rpc` for asyncio."""

    def __init__(self, bridge: Bridge, rpc: Callable[[], Rpc]) -> None:
        self._bridge = bridge
        self._rpc = rpc

    def register(self, service: Service) -> None:
        """Answer calls to a service's methods: async ones run in this event loop, plain functions in threads.

        Async methods that are written for trio are registered in trio: `await node.run(lambda node:
        node.rpc.register(service))`.
        """
        here = Service(service.name)
        for name, method in service.methods.items():
            here.add(name, in_asyncio(self._bridge, method.handler))
        self._bridge.background.read(lambda node: self._rpc().register(here))

    @property
    def services(self) -> Mapping[str, Service]:
        """What is registered, by name."""
        return self._bridge.background.read(lambda node: dict(self._rpc().services))

    async def call(
        self,
        peer: PeerId | str,
        method: str,
        *args: object,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        idempotent: bool = False,
    ) -> Any:
        """As `Rpc.call`."""
        rpc = self._rpc()
        return await self._bridge.call(
            lambda: rpc.call(peer, method, *args, timeout=timeout, idempotent=idempotent)
        )

    def stream(
        self, peer: PeerId | str, method: str, *args: object, timeout: float | None = None
    ) -> AsyncioStream:
        """As `Rpc.stream`: `async with node.rpc.stream(...) as items: async for item in items`."""
        return AsyncioStream(self._bridge, lambda: self._rpc().stream(peer, method, *args, timeout=timeout))


class AsyncioStream:
    """A call with items in either direction. One task may iterate while another sends."""

    def __init__(self, bridge: Bridge, block: Callable[[], Any]) -> None:
        self._bridge = bridge
        self._held = Held[ClientStream](bridge.background, block)
        self._is_entered = False
        self._items: deque[Any] = deque()  # arrived with one that was asked for

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise LocalProtocolError("a stream is entered once; call the method again")
        await self._bridge.call(self._held.open)
        self._is_entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._items.clear()
        try:
            await self._bridge.call(self._held.leave)
        except Exception:
            if error is None:
                raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The handler's next item. Raises what the handler raised, after the items before it."""
        if not self._items:
            await self._work(lambda: take_items(self._held.value, self._items))
        return self._items.popleft()

    async def send(self, item: object) -> None:
        """As `ClientStream.send`: waits while the handler's side has no room."""
        await self._work(lambda: self._held.value.send(item))

    async def finish(self) -> None:
        """Say that no more items come."""
        await self._work(lambda: self._held.value.finish())

    async def result(self) -> Any:
        """What the handler returns, None for a generator. Says `finish` first; drops items not yet read."""
        self._items.clear()
        return await self._work(lambda: self._held.value.result())

    async def _work(self, function: Callable[[], Awaitable[Any]]) -> Any:
        if not self._is_entered:
            raise LocalProtocolError(
                "the stream is not open; write `async with node.rpc.stream(...) as items`"
            )
        return await self._bridge.call(lambda: self._held.work(function))


class AsyncioRecords:
    """`node.dht`: a node's records for asyncio."""

    def __init__(self, bridge: Bridge, records: Callable[[], Records]) -> None:
        self._bridge = bridge
        self._records = records

    async def put(self, key: str, value: bytes, *, ttl: float = DEFAULT_TTL_SECONDS, subkey: str = "") -> int:
        """As `Records.put`."""
        return await self._bridge.call(lambda: self._records().put(key, value, ttl=ttl, subkey=subkey))

    async def get(self, key: str, *, author: PeerId | str | None = None, subkey: str = "") -> Record:
        """As `Records.get`."""
        return await self._bridge.call(lambda: self._records().get(key, author=author, subkey=subkey))

    async def get_all(self, key: str) -> list[Record]:
        """As `Records.get_all`."""
        return await self._bridge.call(lambda: self._records().get_all(key))
