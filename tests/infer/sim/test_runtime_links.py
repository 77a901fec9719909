"""What a round costs in links, and what happens when one of them, or the peer behind it, is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from safetensors.torch import load_file, save_file
from trio.testing import MockClock

from lattica.errors import OverloadedError
from lattica_infer.errors import NoRouteError, ShardLostError
from lattica_infer.shard.sessions import SessionLimits

LINK = 0.05
PROMPT = [7, 90, 33, 33, 90, 7, 12]


async def is_idle_within(swarm: Any, seconds: float) -> bool:
    """Whether no shard holds anything for anybody, at the latest after so many seconds."""
    for _ in range(round(seconds / 0.01)):
        if swarm.is_idle():
            return True
        await trio.sleep(0.01)
    return False


class Watched:
    """A generation of 200 tokens in which something happens after the third."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.happened = 0.0

    async def run(self, mesh: Any, happens: Callable[[], object]) -> None:
        async with mesh.generate(PROMPT, max_tokens=200, drafter="none") as self.stream:
            async for token in self.stream:
                self.tokens.append(token.id)
                if len(self.tokens) == 3:
                    self.happened = trio.current_time()
                    happens()


@pytest.mark.parametrize("parts", [1, 3, 5])
async def test_a_round_costs_a_link_per_stage_and_one_back(
    parts: int, open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(parts)
        mesh = await swarm.mesh()
        for _ in range(2):
            async with mesh.generate(PROMPT, max_tokens=8, drafter="none") as stream:
                assert len([token async for token in stream]) == 8
            assert stream.stats.tokens_per_second == pytest.approx(1 / ((parts + 1) * LINK))
        # The second time all streams are there: one round trip opens the sessions, then comes the first round.
        assert stream.stats.time_to_first_token_seconds == pytest.approx((2 + parts + 1) * LINK)


async def test_a_long_prompt_is_sent_in_chunks_that_do_not_wait(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        seconds = []
        for length in (10, 10, 500):
            async with mesh.generate([5] * length, max_tokens=1, drafter="none") as stream:
                assert [token async for token in stream]
            seconds.append(stream.stats.time_to_first_token_seconds)
        assert seconds[2] == pytest.approx(seconds[1])
        assert [shard.sessions.limits.rows_per_session >= 500 for shard in swarm.shards] == [True] * 3


async def test_a_shard_that_dies_ends_the_generation_by_name_and_frees_the_others(
    open_swarm: Any, greedy: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        nodes = await swarm.serve(3)
        mesh = await swarm.mesh()
        watched = Watched()
        with pytest.raises(ShardLostError, match="layers 2-2") as caught:
            await watched.run(mesh, nodes[1].host.stop)
        assert trio.current_time() - watched.happened < 1
        assert (caught.value.peer, caught.value.layers) == (nodes[1].peer_id, range(2, 3))
        assert watched.tokens == greedy(PROMPT, len(watched.tokens))
        assert watched.stream.stats.shards_lost == 1
        assert await is_idle_within(swarm, 5)


async def test_a_shard_that_falls_silent_is_given_up(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=LINK) as swarm:
        nodes = await swarm.serve(3)
        mesh = await swarm.mesh()
        others = [node.host for node in swarm.nodes if node is not nodes[2]]
        watched = Watched()
        with pytest.raises(ShardLostError, match="silent for") as caught:
            await watched.run(mesh, lambda: swarm.network.partition([nodes[2].host], others))
        assert caught.value.peer == nodes[2].peer_id
        assert trio.current_time() - watched.happened < 8
        assert await is_idle_within(swarm, 30)  # the silent one frees its rows by itself


async def test_a_link_between_two_shards_that_is_cut_names_the_one_behind_it(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        nodes = await swarm.serve(3)
        mesh = await swarm.mesh()
        with pytest.raises(ShardLostError) as caught:
            await Watched().run(mesh, lambda: swarm.network.cut(nodes[1].host, nodes[2].host))
        assert caught.value.peer == nodes[2].peer_id
        assert await is_idle_within(swarm, 5)


async def test_leaving_a_generation_frees_every_shard(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        async with mesh.generate(PROMPT, max_tokens=200) as stream:
            async for _ in stream:
                break
            assert not swarm.is_idle()
        assert await is_idle_within(swarm, 1)


async def test_cancelling_a_generation_frees_every_shard(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        with trio.move_on_after(1.0) as scope:
            async with mesh.generate(PROMPT, max_tokens=200, drafter="none") as stream:
                async for _ in stream:
                    pass
        assert scope.cancelled_caught
        assert await is_idle_within(swarm, 1)


async def test_an_error_in_the_block_comes_out_as_it_is(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        with pytest.raises(ZeroDivisionError):
            await Watched().run(mesh, lambda: 1 // 0)
        assert await is_idle_within(swarm, 1)


async def test_a_finished_generation_has_freed_every_shard(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        async with mesh.generate(PROMPT, max_tokens=4) as stream:
            assert [token async for token in stream]
        assert swarm.is_idle()


async def test_a_dead_shard_in_the_records_is_left_out_of_the_route(
    open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        first = await swarm.serve(2)
        mesh = await swarm.mesh()
        await swarm.serve(2)
        assert await generate(mesh, PROMPT, max_tokens=4) == greedy(PROMPT, 4)
        for node in first:
            node.host.stop()
        assert await generate(mesh, PROMPT, max_tokens=8) == greedy(PROMPT, 8)


async def test_a_full_shard_is_passed_by_where_another_has_the_layers(
    open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    none = SessionLimits(rows_per_session=1000, rows_per_peer=1000, rows=1000, sessions=0)
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(1, limits=none)
        mesh = await swarm.mesh()
        with pytest.raises(OverloadedError, match="the shard is full"):
            await generate(mesh, PROMPT, max_tokens=8)
        await swarm.serve(2)
        assert await generate(mesh, PROMPT, max_tokens=8) == greedy(PROMPT, 8)


async def test_layers_that_nobody_serves_are_named(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=LINK) as swarm:
        node, coordinator = await swarm.node(), await swarm.node()
        async with swarm.serving(node, range(1, 3)):
            with pytest.raises(NoRouteError, match=r"layers 0, 3-4 have no live shard") as caught:
                await swarm.stack.enter_async_context(swarm.opening(coordinator))
            assert caught.value.missing == (0, 3, 4)


async def test_a_shard_that_is_withdrawn_is_no_longer_found(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        node, coordinator = await swarm.node(), await swarm.node()
        async with swarm.serving(node, range(5)), swarm.opening(coordinator) as mesh:
            assert [shard.layers for shard in mesh.shards] == [range(5)]
        assert not await mesh.discover()
        assert mesh.shards == ()


async def test_a_node_serves_two_ranges_and_generates_by_itself(
    open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        node = await swarm.node()
        serving = (swarm.serving(node, range(2)), swarm.serving(node, range(2, 5)))
        async with serving[0], serving[1], swarm.opening(node) as mesh:
            assert await generate(mesh, PROMPT, max_tokens=8) == greedy(PROMPT, 8)


async def test_a_shard_that_closes_says_so(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=LINK) as swarm:
        node, coordinator = await swarm.node(), await swarm.node()
        closing = trio.Event()

        async def serve(task_status: Any) -> None:
            async with swarm.serving(node, range(5)):
                task_status.started()
                await closing.wait()

        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve(task_status))
            async with swarm.opening(coordinator) as mesh:
                with pytest.raises(ShardLostError, match="the shard is closing"):
                    await Watched().run(mesh, closing.set)


async def test_generations_at_the_same_time_do_not_mix(
    open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=LINK) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        outputs: dict[int, list[int]] = {}

        async def one(first: int) -> None:
            outputs[first] = await generate(mesh, [first, *PROMPT], max_tokens=20)

        async with trio.open_nursery() as nursery:
            for first in range(10, 16):
                nursery.start_soon(one, first)
        assert outputs == {first: greedy([first, *PROMPT], 20) for first in range(10, 16)}


async def test_a_model_that_computes_nonsense_is_an_error_and_not_a_token(
    open_swarm: Any, generate: Any, make_tiny_model: Any, autojump_clock: MockClock
) -> None:
    folder = make_tiny_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    async with open_swarm(model=folder) as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        with pytest.raises(ShardLostError, match=r"layers 2-4.*NaN"):
            await generate(mesh, PROMPT, max_tokens=8)
        assert await is_idle_within(swarm, 1)
