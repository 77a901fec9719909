"""A swarm in memory that serves the tiny model: nodes, shards, a coordinator, and what one process would say."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import lattica
import lattica_infer
from lattica.node import Node
from lattica.testing import MemoryNetwork
from lattica_infer.client.service import Mesh
from lattica_infer.shard.service import Shard
from lattica_infer.shard.worker import Worker

LAYERS = 5


async def inline(job: Callable[[], Any], **_: Any) -> Any:
    """Compute on the event loop: a virtual clock would run on while a thread works."""
    await trio.lowlevel.checkpoint()
    return job()


class Swarm:
    """A first node that keeps records, and whatever is added to it; all end with the test."""

    def __init__(
        self, network: MemoryNetwork, stack: AsyncExitStack, *, model: Path, layers: int = LAYERS
    ) -> None:
        self.network = network
        self.model = model
        self.layers = layers
        self.stack = stack
        self.nodes: list[Node] = []
        self.shards: list[Shard] = []

    async def node(self) -> Node:
        first = self.nodes[:1]
        config = lattica.NodeConfig(bootstrap=[address for node in first for address in node.addresses])
        opened = lattica.open_node(config, network=self.network, rng=random.Random(1))
        node = await self.stack.enter_async_context(opened)
        await node.online(timeout=30)
        self.nodes.append(node)
        return node

    def serving(self, node: Node, layers: range, **settings: Any) -> Any:
        """`serve_shard` for the tiny model, computing on the event loop; a context manager."""
        worker = settings.pop("worker", None) or Worker(run_sync=inline)
        return lattica_infer.serve_shard(node, str(self.model), layers, worker=worker, **settings)

    async def serve(self, parts: int, **settings: Any) -> list[Node]:
        """`parts` new nodes, each with its share of the layers."""
        borders = [round(part * self.layers / parts) for part in range(parts + 1)]
        nodes = [await self.node() for _ in range(parts)]
        for node, first, stop in zip(nodes, borders, borders[1:], strict=False):
            self.shards.append(
                await self.stack.enter_async_context(self.serving(node, range(first, stop), **settings))
            )
        return nodes

    def opening(self, node: Node) -> Any:
        """`open_model` for the tiny model; a context manager."""
        return lattica_infer.open_model(node, str(self.model))

    async def mesh(self) -> Mesh:
        """The model, opened by a new node that holds no layers."""
        mesh: Mesh = await self.stack.enter_async_context(self.opening(await self.node()))
        return mesh

    def is_idle(self) -> bool:
        """Whether no shard holds anything for anybody."""
        return all(len(shard.sessions) == 0 == shard.sessions.rows for shard in self.shards)


@pytest.fixture
def open_swarm(tiny_model: Path) -> Callable[..., Any]:
    """`async with open_swarm(latency=0.05) as swarm`: a `Swarm` with its first node."""

    @asynccontextmanager
    async def opened(model: Path = tiny_model, layers: int = LAYERS, **settings: Any) -> AsyncIterator[Swarm]:
        async with MemoryNetwork(**settings) as network, AsyncExitStack() as stack:
            swarm = Swarm(network, stack, model=model, layers=layers)
            await swarm.node()
            yield swarm

    return opened


async def tokens_of(mesh: Mesh, prompt: str | Sequence[int], **settings: Any) -> list[int]:
    """The ids of a whole generation."""
    async with mesh.generate(prompt, **settings) as stream:
        return [token.id async for token in stream]


@pytest.fixture
def generate() -> Callable[..., Any]:
    """`await generate(mesh, prompt, **settings)`: the ids of a whole generation."""
    return tokens_of
