"""A peer that sends nonsense sees its own request fail, and nobody else's."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from lattica import protocols
from lattica.errors import CallError, RemoteError
from lattica.ids import Cid
from lattica.node import Node
from lattica_infer.errors import CacheFullError
from lattica_infer.messages import Hop, Sampling, SessionSpec, StepFrame, shards_key
from lattica_infer.shard.service import Shard
from lattica_infer.shard.sessions import SessionLimits

PROMPT = [7, 90, 33, 33, 90, 7, 12]
FRAME = StepFrame(0, 0, 0, (), (1, 2, 3), (-1, 0, 1), walk=True)


class Stranger:
    """Speaks the shard protocol to one shard, by hand."""

    def __init__(self, node: Node, shard: Shard, peer: Node) -> None:
        self.rpc = node.endpoint(protocols.SHARD)
        self.peer = peer.peer_id
        self.me = node.peer_id
        self.shard = shard
        node.host.add_addresses(peer.peer_id, peer.addresses)

    def spec(self, **changes: Any) -> SessionSpec:
        spec = SessionSpec(
            session=secrets.token_bytes(16),
            model=self.shard.model.cid,
            layers=self.shard.layers,
            rows=64,
            previous=self.me,
            next=None,
            sampling=Sampling(),
        )
        return dataclasses.replace(spec, **changes)

    async def refusal(self, value: object) -> str:
        """What the shard says to `open` with this value."""
        with pytest.raises(CallError) as caught:
            await self._open(value)
        return str(caught.value)

    async def _open(self, value: object) -> None:
        async with self.rpc.stream(self.peer, "shard.open", value) as events:
            await anext(aiter(events))

    async def failure(self, spec: SessionSpec, frames: Sequence[object]) -> str:
        """How a session ends in which these frames are sent."""
        with pytest.raises(RemoteError) as caught:
            await self._session(spec, frames)
        return str(caught.value)

    async def _session(self, spec: SessionSpec, frames: Sequence[object]) -> None:
        layers = [spec.layers.start, spec.layers.stop]
        async with self.rpc.stream(self.peer, "shard.open", spec.to_value()) as events:
            assert (await anext(aiter(events)))[0] == "opened"
            call = self.rpc.stream(self.peer, "shard.step", str(self.me), spec.session, layers)
            async with call as step:
                for frame in frames:
                    await step.send(frame)
                async for _ in events:
                    pass


def hidden(rows: int = 3, width: int = 64, value: float = 0.0) -> Any:
    return np.full((rows, width), value, np.float32)


BAD_FRAMES: dict[str, tuple[Any, str]] = {
    "a token out of range": (dataclasses.replace(FRAME, tokens=(1, 2, 300)), "tokens 300 is not in 0..299"),
    "activations at the first stage": (dataclasses.replace(FRAME, hidden=hidden()), "takes no activations"),
    "a commit of nothing": (dataclasses.replace(FRAME, commit=(0,)), "no path of the last frame"),
    "a base beyond the prefix": (dataclasses.replace(FRAME, base=7), "base 7 where 0 rows"),
    "another epoch": (dataclasses.replace(FRAME, epoch=1), "epoch 1 in a session of epoch 0"),
    "a later window": (dataclasses.replace(FRAME, window=1), "window 1 where 0 is next"),
    "more rows than granted": (
        dataclasses.replace(FRAME, tokens=(1,) * 65, parents=tuple(range(-1, 64))),
        "CacheFullError: the session has 64 cache rows",
    ),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_bad_frame_ends_its_own_session_alone(
    name: str, open_swarm: Any, greedy: Any, autojump_clock: MockClock
) -> None:
    frame, reason = BAD_FRAMES[name]
    async with open_swarm() as swarm:
        nodes = await swarm.serve(1)
        mesh = await swarm.mesh()
        stranger = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        async with mesh.generate(PROMPT, max_tokens=20, drafter="none") as stream:
            received = [(await anext(aiter(stream))).id]
            assert reason in await stranger.failure(stranger.spec(), [frame.to_value()])
            assert reason in await stranger.failure(stranger.spec(), [frame.to_value()])
            received += [token.id async for token in stream]
        assert received == greedy(PROMPT, 20)
        assert swarm.is_idle()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (dataclasses.replace(FRAME, hidden=hidden(width=63)), "float32 [3, 63], not float32 [3, 64]"),
        (dataclasses.replace(FRAME, hidden=hidden(rows=2)), "float32 [2, 64], not float32 [3, 64]"),
        (dataclasses.replace(FRAME, hidden=hidden(value=float("nan"))), "not finite"),
        (dataclasses.replace(FRAME, hidden=hidden(value=float("inf"))), "not finite"),
        (dataclasses.replace(FRAME, hidden=hidden().astype(np.float64)), "float64"),
        (FRAME, "not a tensor"),
    ],
)
async def test_bad_activations_end_their_own_session_alone(
    frame: StepFrame, reason: str, open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        nodes = await swarm.serve(2)
        mesh = await swarm.mesh()
        stranger = Stranger(await swarm.node(), swarm.shards[1], nodes[1])
        assert reason in await stranger.failure(stranger.spec(), [frame.to_value()])
        assert await generate(mesh, PROMPT, max_tokens=8) == greedy(PROMPT, 8)


async def test_a_shard_says_what_it_serves_to_whoever_asks_for_something_else(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        nodes = await swarm.serve(2)
        stranger = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        other = Cid.of(b"another model")
        behind = Hop(nodes[1].peer_id, range(2, 5))
        served = f"but layers 0-1 of {swarm.shards[0].model.cid}"
        for changes, reason in (
            ({"model": other}, f"no layers of model {other} are served here, {served}"),
            ({"layers": range(1)}, f"are not served here, {served}"),
            ({"numeric_class": "cuda-bf16"}, "the numeric class here is cpu-fp32"),
            ({"next": None}, "hand over to None"),
            ({"next": behind, "previous": nodes[1].peer_id}, "from the coordinator"),
            ({"next": behind, "epoch": 1}, "epoch 1"),
            ({"next": behind, "rows": 1 << 20}, "CacheFullError: 1048576 cache rows asked"),
        ):
            assert reason in await stranger.refusal(stranger.spec(**changes).to_value())
        assert "a session spec is a map" in await stranger.refusal([1, 2, 3])
        assert swarm.is_idle()


async def test_nobody_else_steps_a_session(open_swarm: Any, greedy: Any, autojump_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        nodes = await swarm.serve(1)
        owner = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        thief = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        spec = owner.spec()
        async with owner.rpc.stream(owner.peer, "shard.open", spec.to_value()) as events:
            assert (await anext(aiter(events)))[0] == "opened"
            arguments = (str(owner.me), spec.session, [0, 5])
            async with thief.rpc.stream(owner.peer, "shard.step", *arguments) as step:
                with pytest.raises(RemoteError, match="from its previous hop alone"):
                    await step.result()
            async with owner.rpc.stream(owner.peer, "shard.step", *arguments) as step:
                await step.send(FRAME.to_value())
                kind, _, window, tokens, *_ = await anext(aiter(events))
                assert (kind, window) == ("verdict", 0)
                assert tokens == greedy([1, 2, 3], 1)


async def test_a_step_stream_without_a_session_is_refused_in_time(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        nodes = await swarm.serve(1)
        stranger = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        with pytest.raises(RemoteError, match="no such session is open here"):
            await stranger.rpc.call(
                stranger.peer, "shard.step", str(stranger.me), b"s" * 16, [0, 5], timeout=15
            )


async def test_a_session_that_nobody_renews_ends(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        nodes = await swarm.serve(1)
        stranger = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        started = trio.current_time()
        assert "the lease ran out: nothing heard for 20 s" in await stranger.failure(stranger.spec(), [])
        assert trio.current_time() - started == pytest.approx(20, abs=1)
        assert swarm.is_idle()


async def test_renewals_keep_a_session(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        nodes = await swarm.serve(1)
        stranger = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        async with stranger.rpc.stream(stranger.peer, "shard.open", stranger.spec().to_value()) as events:
            assert (await anext(aiter(events)))[0] == "opened"
            for _ in range(10):
                await trio.sleep(15)
                await events.send(None)
                assert (await anext(aiter(events)))[0] == "alive"
            assert not swarm.is_idle()


async def test_a_greedy_peer_leaves_room_for_others(
    open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    limits = SessionLimits(rows_per_session=200, rows_per_peer=200, rows=400)
    async with open_swarm() as swarm:
        nodes = await swarm.serve(1, limits=limits)
        mesh = await swarm.mesh()
        stranger = Stranger(await swarm.node(), swarm.shards[0], nodes[0])
        first = stranger.spec(rows=200)
        async with stranger.rpc.stream(stranger.peer, "shard.open", first.to_value()) as events:
            assert (await anext(aiter(events)))[0] == "opened"
            assert "CacheFullError" in await stranger.refusal(stranger.spec(rows=200).to_value())
            assert await generate(mesh, PROMPT, max_tokens=8) == greedy(PROMPT, 8)


async def test_a_generation_too_long_for_the_shard_is_told_so(
    open_swarm: Any, generate: Any, autojump_clock: MockClock
) -> None:
    limits = SessionLimits(rows_per_session=100, rows_per_peer=200, rows=400)
    async with open_swarm() as swarm:
        await swarm.serve(2, limits=limits)
        mesh = await swarm.mesh()
        with pytest.raises(CacheFullError, match="a session here gets at most 100: shorten the prompt"):
            await generate(mesh, PROMPT, max_tokens=100)


@pytest.mark.parametrize("value", [b"garbage", b"\x81\xa6layers\x92\x00\xce\xff\xff\xff\xff", b"\xc1" * 50])
async def test_a_broken_announcement_hurts_nobody(
    value: bytes, open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(1)
        liar = await swarm.node()
        await liar.dht.put(shards_key(swarm.shards[0].model.cid), value, ttl=60, subkey="0-5")
        mesh = await swarm.mesh()
        assert await generate(mesh, PROMPT, max_tokens=8) == greedy(PROMPT, 8)
