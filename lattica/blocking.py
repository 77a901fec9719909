"""The blocking face of a node: `with lattica.portal(config) as mesh`, for programs without any async.

Every method may be called from any thread but the node's own, from several at once. Ctrl-C in a call cancels
that call; the node closes when the block is left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from lattica.background import Background, Held, take_items
from lattica.config import NodeConfig
from lattica.dht.records import Record
from lattica.dht.service import DEFAULT_TTL_SECONDS, Records
from lattica.errors import LocalProtocolError
from lattica.ids import PeerId
from lattica.net.api import Peer
from lattica.node import Mapping as NatMapping
from lattica.node import Node, Reachability, open_node
from lattica.protocols import DEFAULT_TIMEOUT_SECONDS
from lattica.rpc.service import ClientStream, Rpc, Service

T = TypeVar("T")
P = ParamSpec("P")


def portal(config: NodeConfig | None = None) -> Portal:
    """A node for threads: `with lattica.portal(config) as mesh: mesh.call(peer_id, "greeter.hello", "Ada")`.

    The node runs on a trio thread of its own while the block runs. What `lattica.open_node` raises comes out of
    the block in the same way.
    """
    return Portal(config)


class Portal:
    """A `lattica.Node` with blocking methods under the same names. Made by `portal`, closed with its block."""

    def __init__(self, config: NodeConfig | None = None) -> None:
        self._opened = threading.Event()
        self._background = Background(lambda: open_node(config), opened=self._opened.set, ended=lambda: None)
        self.rpc: BlockingRpc
        self.dht: BlockingRecords
        self._node: Node | None = None

    def __enter__(self) -> Self:
        if self._node is not None:
            raise LocalProtocolError("a portal is entered once; make another one")
        try:
            self._background.start()
            self._opened.wait()
        except BaseException:  # Ctrl-C
            self._close()
            raise
        node = self._background.node
        if node is None:
            self._close()
            raise self._background.failure or self._background.closed()
        self._node = node
        self.rpc = BlockingRpc(self._background, lambda: node.rpc)
        self.dht = BlockingRecords(self._background, lambda: node.dht)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if error is None and self._background.failure is not None:
            raise self._background.failure

    # Who and where

    @property
    def config(self) -> NodeConfig:
        """Its settings."""
        return self._running().config

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        return self._running().peer_id

    @property
    def data_dir(self) -> Path | None:
        """Its folder, None when it touches no disk."""
        return self._running().data_dir

    @property
    def addresses(self) -> list[str]:
        """Dialable multiaddrs of this node, with `/p2p/`, no wildcards."""
        return self.run(lambda node: node.addresses)

    @property
    def reachability(self) -> Reachability:
        """Whether others can dial it."""
        return self._running().reachability

    @property
    def mapping(self) -> NatMapping:
        """What its NAT does."""
        return self._running().mapping

    @property
    def uptime_seconds(self) -> float:
        """Since the node was opened."""
        return self.run(lambda node: node.uptime_seconds)

    def peers(self) -> list[Peer]:
        """The peers that it is connected to."""
        return self.run(Node.peers)

    def connect(self, address: str) -> PeerId:
        """As `Node.connect`."""
        return self._background.call(lambda: self._running().connect(address))

    def online(self, timeout: float = 30.0) -> None:
        """As `Node.online`."""
        self._background.call(lambda: self._running().online(timeout))

    # Calls

    def call(
        self,
        peer: PeerId | str,
        method: str,
        *args: object,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        idempotent: bool = False,
    ) -> Any:
        """As `Rpc.call`; short for `rpc.call`."""
        return self.rpc.call(peer, method, *args, timeout=timeout, idempotent=idempotent)

    def stream(
        self, peer: PeerId | str, method: str, *args: object, timeout: float | None = None
    ) -> BlockingStream:
        """As `Rpc.stream`; short for `rpc.stream`."""
        return self.rpc.stream(peer, method, *args, timeout=timeout)

    def endpoint(self, protocol: str) -> BlockingRpc:
        """As `Node.endpoint`: calls under a protocol id of their own."""
        rpc = self.run(lambda node: node.endpoint(protocol))
        return BlockingRpc(self._background, lambda: rpc)

    def run(self, function: Callable[Concatenate[Node, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(node, ...)` on the node's thread, and wait for it; for what has no blocking face.

        An async function is awaited. A plain one must not wait.
        """

        async def work() -> T:
            value: Any = function(self._running(), *args, **kwargs)
            result: T = await value if isinstance(value, Awaitable) else value
            return result

        return self._background.call(work)

    # Inside

    def _running(self) -> Node:
        if self._node is None:
            raise LocalProtocolError("the node is not open; write `with lattica.portal(config) as mesh`")
        return self._node

    def _close(self) -> None:
        self._background.stop()
        self._background.join()


class BlockingRpc:
    """`mesh.rpc`: a `lattica.rpc.service.Rpc` with blocking methods."""

    def __init__(self, background: Background, rpc: Callable[[], Rpc]) -> None:
        self._background = background
        self._rpc = rpc

    def register(self, service: Service) -> None:
        """Answer calls to a service's methods. Plain functions run in threads, async ones in trio."""

        async def work() -> None:
            self._rpc().register(service)

        self._background.call(work)

    @property
    def services(self) -> Mapping[str, Service]:
        """What is registered, by name."""
        return dict(self._rpc().services)

    def call(
        self,
        peer: PeerId | str,
        method: str,
        *args: object,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        idempotent: bool = False,
    ) -> Any:
        """As `Rpc.call`."""
        return self._background.call(
            lambda: self._rpc().call(peer, method, *args, timeout=timeout, idempotent=idempotent)
        )

    def stream(
        self, peer: PeerId | str, method: str, *args: object, timeout: float | None = None
    ) -> BlockingStream:
        """As `Rpc.stream`: `with mesh.rpc.stream(...) as items: for item in items`."""
        return BlockingStream(
            self._background, lambda: self._rpc().stream(peer, method, *args, timeout=timeout)
        )


class BlockingStream:
    """A call with items in either direction. One thread may iterate while another sends."""

    def __init__(self, background: Background, block: Callable[[], Any]) -> None:
        self._background = background
        self._block = block
        self._held: Held[ClientStream] | None = None
        self._items: deque[Any] = deque()  # arrived with one that was asked for

    def __enter__(self) -> Self:
        if self._held is not None:
            raise LocalProtocolError("a stream is entered once; call the method again")
        held = Held[ClientStream](self._background, self._block)
        self._background.call(held.open)
        self._held = held
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._held is not None
        self._items.clear()
        try:
            self._background.call(self._held.leave)
        except Exception:
            if error is None:
                raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The handler's next item. Raises what the handler raised, after the items before it."""
        if not self._items:
            try:
                self._work(lambda: take_items(self._stream(), self._items))
            except StopAsyncIteration:
                raise StopIteration from None
        return self._items.popleft()

    def send(self, item: object) -> None:
        """As `ClientStream.send`: waits while the handler's side has no room."""
        self._work(lambda: self._stream().send(item))

    def finish(self) -> None:
        """Say that no more items come."""
        self._work(lambda: self._stream().finish())

    def result(self) -> Any:
        """What the handler returns, None for a generator. Says `finish` first; drops items not yet read."""
        self._items.clear()
        return self._work(lambda: self._stream().result())

    def _stream(self) -> ClientStream:
        assert self._held is not None
        return self._held.value

    def _work(self, function: Callable[[], Awaitable[Any]]) -> Any:
        held = self._held
        if held is None:
            raise LocalProtocolError("the stream is not open; write `with mesh.stream(...) as items`")
        return self._background.call(lambda: held.work(function))


class BlockingRecords:
    """`mesh.dht`: a node's records with blocking methods."""

    def __init__(self, background: Background, records: Callable[[], Records]) -> None:
        self._background = background
        self._records = records

    def put(self, key: str, value: bytes, *, ttl: float = DEFAULT_TTL_SECONDS, subkey: str = "") -> int:
        """As `Records.put`."""
        kept: int = self._background.call(lambda: self._records().put(key, value, ttl=ttl, subkey=subkey))
        return kept

    def get(self, key: str, *, author: PeerId | str | None = None, subkey: str = "") -> Record:
        """As `Records.get`."""
        record: Record = self._background.call(lambda: self._records().get(key, author=author, subkey=subkey))
        return record

    def get_all(self, key: str) -> list[Record]:
        """As `Records.get_all`."""
        records: list[Record] = self._background.call(lambda: self._records().get_all(key))
        return records
