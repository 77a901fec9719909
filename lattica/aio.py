"""The asyncio face of a node: `async with lattica.aio.open_node(config) as node`, with the same names.

The node runs on a trio thread of its own. Calls cross over in batches: what an event loop asks in one pass wakes
the other thread once, and so do the answers. Cancelling a task cancels what it waits for there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import trio

from lattica.background import Background, Held, Job
from lattica.config import NodeConfig
from lattica.dht.records import Record
from lattica.dht.service import DEFAULT_TTL_SECONDS, Records
from lattica.errors import LocalProtocolError
from lattica.ids import PeerId
from lattica.net.api import Peer
from lattica.node import Mapping as NatMapping
from lattica.node import Node, Reachability
from lattica.node import open_node as open_trio_node
from lattica.protocols import DEFAULT_TIMEOUT_SECONDS
from lattica.rpc.methods import Handler
from lattica.rpc.outside import OutsideCall, is_threaded
from lattica.rpc.service import Call, ClientStream, Rpc, Service

T = TypeVar("T")
P = ParamSpec("P")

_END: Final = object()


def open_node(config: NodeConfig | None = None) -> AsyncioNode:
    """A node for asyncio: `async with lattica.aio.open_node(config) as node`. Raises as `lattica.open_node` does."""
    return AsyncioNode(config)


class Bridge:
    """Between an asyncio loop and a Background: functions to run, in order, one wake-up for all that wait."""

    def __init__(self, config: NodeConfig | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.opened = Waiter(self)
        self.ended = Waiter(self)
        self.background = Background(lambda: open_trio_node(config), opened=self.opened, ended=self.ended)
        self._there: deque[Callable[[], object]] = deque()
        self._here: deque[Callable[[], object]] = deque()
        self._is_waking_there = False
        self._is_waking_here = False

    async def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run work on the trio thread; its result. Cancelled, it waits until the work has been cancelled."""
        if asyncio.get_running_loop() is not self.loop:
            raise LocalProtocolError("the node belongs to another event loop; open one in this loop")
        self.background.check()
        waiter = Waiter(self)
        job = Job(work, waiter)
        self.run_there(partial(self.background.submit, job))
        await waiter.wait(partial(self.run_there, job.cancel))
        return job.result()

    def run_there(self, function: Callable[[], object]) -> None:
        """Run a function on the trio thread, soon. From the loop's thread."""
        self._there.append(function)
        if self._is_waking_there:
            return
        self._is_waking_there = True
        try:
            self.background.post(self._run_there)
        except BaseException:
            self._is_waking_there = False
            self._there.clear()
            raise

    def run_here(self, function: Callable[[], object]) -> None:
        """Run a function in the loop, soon. From the trio thread; RuntimeError when the loop is closed."""
        self._here.append(function)
        if self._is_waking_here:
            return
        self._is_waking_here = True
        try:
            self.loop.call_soon_threadsafe(self._run_here)
        except RuntimeError:
            self._is_waking_here = False
            self._here.clear()
            raise

    def _run_there(self) -> None:
        self._is_waking_there = False
        while self._there:
            self._there.popleft()()

    def _run_here(self) -> None:
        self._is_waking_here = False
        while self._here:
            self._here.popleft()()

    # Handlers

    async def run_handler(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a handler's coroutine in the loop; from trio. Cancelled, it cancels the handler and goes on."""
        done = trio.Event()
        task: asyncio.Task[T] | None = None

        def start() -> None:
            nonlocal task
            task = self.loop.create_task(work)
            task.add_done_callback(finished)

        def finished(task: asyncio.Task[T]) -> None:
            task.cancelled() or task.exception()  # it is read here, whether or not somebody waits for it
            with suppress(LocalProtocolError):
                self.run_there(done.set)

        def cancel() -> None:
            if task is not None:
                task.cancel()

        try:
            self.run_here(start)
        except RuntimeError as error:
            work.close()
            raise LocalProtocolError("the event loop of the handler is closed") from error
        try:
            await done.wait()
        except trio.Cancelled:
            with suppress(RuntimeError):
                self.run_here(cancel)
            raise
        assert task is not None
        if task.cancelled():
            raise LocalProtocolError("the handler was cancelled in its event loop")
        return task.result()


class Waiter:
    """One task's wait for one word from the trio thread; called there."""

    __slots__ = ("_bridge", "_future", "_is_over")

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._future: asyncio.Future[None] = bridge.loop.create_future()
        self._is_over = False

    def __call__(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._bridge.run_here(self._finish)

    def _finish(self) -> None:
        self._is_over = True
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, cancel: Callable[[], object]) -> None:
        """Until the word comes. When this task is cancelled: `cancel`, wait for the word, raise CancelledError."""
        try:
            await self._future
        except asyncio.CancelledError:
            with suppress(LocalProtocolError):
                cancel()
                if not self._is_over:
                    self._future = self._bridge.loop.create_future()
                    await self._future
            raise


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
            here.add(name, _in_asyncio(self._bridge, method.handler))
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

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise LocalProtocolError("a stream is entered once; call the method again")
        await self._bridge.call(self._held.open)
        self._is_entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._bridge.call(self._held.leave)
        except Exception:
            if error is None:
                raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The handler's next item. Raises what the handler raised, after the items before it."""
        return await self._work(lambda: self._held.value.__anext__())

    async def send(self, item: object) -> None:
        """As `ClientStream.send`: waits while the handler's side has no room."""
        await self._work(lambda: self._held.value.send(item))

    async def finish(self) -> None:
        """Say that no more items come."""
        await self._work(lambda: self._held.value.finish())

    async def result(self) -> Any:
        """What the handler returns, None for a generator. Says `finish` first; drops items not yet read."""
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


class _Items:
    """A caller's items for a handler in asyncio."""

    def __init__(self, bridge: Bridge, items: AsyncIterator[Any]) -> None:
        self._bridge = bridge
        self._items = items

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return await self._bridge.call(self._items.__anext__)


def _in_asyncio(bridge: Bridge, handler: Handler) -> Handler:
    """A handler that asyncio runs, as one for trio. What runs in threads does so already."""
    if is_threaded(handler):
        return handler

    def outside(call: Call) -> OutsideCall:
        return OutsideCall(call, _Items(bridge, call.items.__aiter__()))

    if inspect.isasyncgenfunction(handler):

        @wraps(handler)
        async def stream(call: Call, *args: Any) -> AsyncIterator[Any]:
            items = handler(outside(call), *args)
            try:
                while (item := await bridge.run_handler(_next(items))) is not _END:
                    yield item
            finally:
                with suppress(RuntimeError):
                    bridge.run_here(lambda: bridge.loop.create_task(items.aclose()))

        return stream

    @wraps(handler)
    async def unary(call: Call, *args: Any) -> Any:
        return await bridge.run_handler(handler(outside(call), *args))

    return unary


async def _next(items: AsyncIterator[Any]) -> Any:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        return _END
