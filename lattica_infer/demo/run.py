"""The demo itself: a swarm, two generations of one prompt, a comparison."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from lattica.control import ControlClient
from lattica_infer.demo.report import PeerRow, Report, Run
from lattica_infer.demo.swarm import NodeProcess, SwarmError, open_node_process
from lattica_infer.weights.store import StoredModel

DEFAULT_PROMPT = (
    "Write a Python function that checks whether a word is a palindrome, and explain how it works."
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for; each is an option of `lattica demo`."""

    prompt: str = DEFAULT_PROMPT
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    shards: int = 3
    link_ms: float = 0.0


class Screen(Protocol):
    """Where the demo shows what it does, while it does it."""

    def step(self, text: str) -> None:
        """What happens next, in a few words."""

    def begin(self, title: str) -> None:
        """A generation starts."""

    def token(self, text: str) -> None:
        """Some of its text."""

    def end(self) -> None:
        """It has ended."""


async def run(model: StoredModel, options: Options, screen: Screen) -> Report:
    """Start the swarm, generate plainly and speculatively, stop everything.

    Raises:
        LatticaError: a process did not start, or a generation failed.
    """
    layers = split_layers(model.config.num_layers, options.shards)
    with tempfile.TemporaryDirectory(prefix="lattica-demo-") as name:
        async with AsyncExitStack() as stack:
            folder, link = Path(name), options.link_ms / 1000
            screen.step(f"starting {options.shards + 2} processes")
            bootstrap = await stack.enter_async_context(
                open_node_process("bootstrap", folder, link_seconds=link)
            )
            roles = [f"shard {number}" for number in range(1, options.shards + 1)]
            nodes = await _open_all(stack, folder, [*roles, "coordinator"], bootstrap, link)
            shards, coordinator = nodes[:-1], nodes[-1]
            await _serve_all(stack, model, shards, layers, screen)
            client = await stack.enter_async_context(coordinator.control())
            settings = {
                "max_tokens": options.max_tokens,
                "temperature": options.temperature,
                "seed": options.seed,
            }
            # Each run gets a drafter of its own, which starts empty: the plain run teaches nobody.
            runs = [
                await _generate(client, model, options.prompt, settings | {"drafter": drafter}, title, screen)
                for drafter, title in (("none", "plain"), ("auto", "speculative"))
            ]
            rows = await _peer_rows(client, bootstrap, shards, layers, coordinator)
        return Report(
            model=model.name,
            prompt=options.prompt,
            plain=runs[0],
            speculative=runs[1],
            peers=rows,
            link_ms=options.link_ms,
            settings={
                "temperature": options.temperature,
                "seed": options.seed,
                "max_tokens": options.max_tokens,
            },
        )


def split_layers(count: int, shards: int) -> list[range]:
    """Cut `count` layers into `shards` ranges whose lengths differ by one at most.

    Raises:
        ValueError: there are more shards than layers, or none.
    """
    if not 1 <= shards <= count:
        raise ValueError(f"{shards} shards cannot share {count} layers: take 1 to {count}")
    cuts = [round(count * index / shards) for index in range(shards + 1)]
    return [range(start, end) for start, end in itertools.pairwise(cuts)]


async def _open_all(
    stack: AsyncExitStack, folder: Path, roles: list[str], bootstrap: NodeProcess, link_seconds: float
) -> list[NodeProcess]:
    """Start all processes at once; a cold start of one after the other would take five times as long."""
    opened: dict[str, NodeProcess] = {}
    waiting = trio.Event()
    nursery = await stack.enter_async_context(trio.open_nursery())
    done = trio.Event()
    stack.callback(done.set)

    async def hold(role: str) -> None:
        async with open_node_process(
            role, folder, bootstrap=[bootstrap.address], link_seconds=link_seconds
        ) as node:
            opened[role] = node
            if len(opened) == len(roles):
                waiting.set()
            await done.wait()

    for role in roles:
        nursery.start_soon(hold, role)
    await waiting.wait()
    return [opened[role] for role in roles]


async def _serve_all(
    stack: AsyncExitStack, model: StoredModel, shards: list[NodeProcess], layers: list[range], screen: Screen
) -> None:
    """Have each shard peer load and announce its layers; returns once all can be found."""
    screen.step(f"loading {model.config.num_layers} layers on {len(shards)} peers")
    clients = [await stack.enter_async_context(shard.control()) for shard in shards]

    async def serve(client: ControlClient, served: range) -> None:
        ends, settings = [served.start, served.stop], {"device": "cpu", "threads": 1}
        await client.call("infer.serve_on", str(model.cid), ends, settings, timeout=None)

    async with trio.open_nursery() as nursery:
        for client, served in zip(clients, layers, strict=True):
            nursery.start_soon(serve, client, served)


async def _generate(
    client: ControlClient,
    model: StoredModel,
    prompt: str,
    settings: dict[str, Any],
    title: str,
    screen: Screen,
) -> Run:
    screen.begin(title)
    tokens: list[int] = []
    pieces: list[str] = []
    stats: dict[str, Any] = {}
    async with client.stream("infer.generate", str(model.cid), prompt, settings) as items:
        async for kind, *rest in items:
            if kind == "stats":
                stats = rest[0]
                continue
            tokens.append(rest[0])
            pieces.append(rest[1])
            screen.token(rest[1])
    screen.end()
    return Run(tokens, "".join(pieces), stats)


async def _peer_rows(
    client: ControlClient,
    bootstrap: NodeProcess,
    shards: list[NodeProcess],
    layers: list[range],
    coordinator: NodeProcess,
) -> list[PeerRow]:
    """The five processes as the coordinator sees them: path and round trip are its own measurements."""
    seen = {peer["peer_id"]: peer for peer in await client.call("node.peers")}
    ends = {shard.peer_id: (served.start, served.stop) for shard, served in zip(shards, layers, strict=True)}
    rows = []
    for node in (bootstrap, *shards):
        peer = seen.get(node.peer_id)
        if peer is None:
            raise SwarmError(f"the coordinator has lost the {node.role} peer, {node.peer_id}")
        rows.append(PeerRow(node.peer_id, node.role, ends.get(node.peer_id), peer["path"], peer["rtt_ms"]))
    return [*rows, PeerRow(coordinator.peer_id, coordinator.role)]
