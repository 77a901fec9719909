"""The demo itself: a swarm, two generations of one prompt, a comparison."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from lattica.control import ControlClient
from lattica_infer.demo.report import PeerRow, Report, Run
from lattica_infer.demo.swarm import NodeProcess, SwarmError, open_node_process
from lattica_infer.weights.store import StoredModel

DEFAULT_PROMPT = (
    "Write a Python class Stack with push, pop, peek, is_empty and size, and show how each is used."
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


@dataclass(frozen=True, slots=True)
class Swarm:
    """The running processes; shard i serves `layers[i]`."""

    bootstrap: NodeProcess
    shards: list[NodeProcess]
    layers: list[range]
    coordinator: NodeProcess


async def run(model: StoredModel, options: Options, screen: Screen) -> Report:
    """Start the swarm, generate plainly and speculatively, stop everything.

    Raises:
        LatticaError: a process did not start, or a generation failed.
    """
    settings = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    with tempfile.TemporaryDirectory(prefix="lattica-demo-") as folder:
        async with (
            open_swarm(model, options, Path(folder), screen.step) as swarm,
            swarm.coordinator.control() as client,
        ):
            screen.step(f"asking: {options.prompt}")
            runs = []
            # Each run gets a drafter of its own, which starts empty: the plain run teaches nobody.
            for drafter, title in (("none", "plain"), ("auto", "speculative")):
                screen.begin(title)
                asked = settings | {"drafter": drafter}
                runs.append(await generate(client, model, options.prompt, asked, screen.token))
                screen.end()
            rows = await _peer_rows(client, swarm)
    return Report(
        model=model.name,
        prompt=options.prompt,
        plain=runs[0],
        speculative=runs[1],
        peers=rows,
        link_ms=options.link_ms,
        settings=settings,
    )


@asynccontextmanager
async def open_swarm(
    model: StoredModel, options: Options, folder: Path, step: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Swarm]:
    """All processes of the demo, shards loaded and found; they end with the block.

    Args:
        folder: empty; each process gets a data folder in it.
        step: told what happens next, in a few words.
    """
    layers, link = split_layers(model.config.num_layers, options.shards), options.link_ms / 1000
    delayed = f", every link delayed by {options.link_ms:g} ms one way" if link else ""
    async with AsyncExitStack() as stack:
        step(f"starting {options.shards + 2} processes{delayed}")
        bootstrap = await stack.enter_async_context(open_node_process("bootstrap", folder, link_seconds=link))
        roles = [f"shard-{number}" for number in range(1, options.shards + 1)]
        *shards, coordinator = await _open_all(stack, folder, [*roles, "coordinator"], bootstrap, link)
        step(f"loading {model.config.num_layers} layers on {len(shards)} peers")
        await _serve_all(stack, model, shards, layers)
        yield Swarm(bootstrap, shards, layers, coordinator)


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
    stack: AsyncExitStack, model: StoredModel, shards: list[NodeProcess], layers: list[range]
) -> None:
    """Have each shard peer load and announce its layers; returns once all can be found."""
    clients = [await stack.enter_async_context(shard.control()) for shard in shards]

    async def serve(client: ControlClient, served: range) -> None:
        ends, settings = [served.start, served.stop], {"device": "cpu", "threads": 1}
        await client.call("infer.serve_on", str(model.folder), ends, settings, timeout=None)

    async with trio.open_nursery() as nursery:
        for client, served in zip(clients, layers, strict=True):
            nursery.start_soon(serve, client, served)


async def generate(
    client: ControlClient,
    model: StoredModel,
    prompt: str,
    settings: dict[str, Any],
    show: Callable[[str], None] = lambda _: None,
) -> Run:
    """One generation by the coordinator's node; `show` gets the text as it comes."""
    tokens: list[int] = []
    pieces: list[str] = []
    stats: dict[str, Any] = {}
    async with client.stream("infer.generate", str(model.folder), prompt, settings) as items:
        async for kind, *rest in items:
            if kind == "stats":
                stats = rest[0]
                continue
            tokens.append(rest[0])
            pieces.append(rest[1])
            show(rest[1])
    return Run(tokens, "".join(pieces), stats)


async def _peer_rows(client: ControlClient, swarm: Swarm) -> list[PeerRow]:
    """The processes as the coordinator sees them: path and round trip are its own measurements."""
    seen = {peer["peer_id"]: peer for peer in await client.call("node.peers")}
    served = {
        shard.peer_id: (layers.start, layers.stop)
        for shard, layers in zip(swarm.shards, swarm.layers, strict=True)
    }
    rows = []
    for node in (swarm.bootstrap, *swarm.shards):
        peer = seen.get(node.peer_id)
        if peer is None:
            raise SwarmError(f"the coordinator has lost the {node.role} peer, {node.peer_id}")
        rows.append(PeerRow(node.peer_id, node.role, served.get(node.peer_id), peer["path"], peer["rtt_ms"]))
    return [*rows, PeerRow(swarm.coordinator.peer_id, swarm.coordinator.role)]
