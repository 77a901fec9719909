"""The pipeline gives what the whole model gives, whatever the number of shards, the drafter and the links."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trio.testing import MockClock

from lattica_infer.spec import DraftTree

PROMPT = [7, 90, 33, 33, 90, 7, 12, 250, 90, 33]
PARTS = [1, 2, 3, 5]


class RandomTrees:
    """Proposes trees of tokens drawn from a small pool, so that a few are right and most are wrong."""

    name = "random trees"

    def __init__(self, seed: int, pool: Sequence[int]) -> None:
        self._random = random.Random(seed)
        self._pool = list(pool)
        self._last = 0

    def begin(self, prompt: Sequence[int]) -> None:
        self._last = prompt[-1]

    def extend(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1]

    def draft(self, budget: int) -> DraftTree:
        nodes = self._random.randint(0, budget)
        parents = [-1, *(self._random.randrange(node) for node in range(1, nodes + 1))]
        return DraftTree([self._last, *self._random.choices(self._pool, k=nodes)], parents)


@pytest.mark.parametrize("parts", PARTS)
async def test_greedy_output_is_the_whole_models(
    parts: int, open_swarm: Any, greedy: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=0.01) as swarm:
        await swarm.serve(parts)
        mesh = await swarm.mesh()
        for drafter in ("none", "suffix", RandomTrees(1, greedy(PROMPT, 40))):
            assert await generate(mesh, PROMPT, max_tokens=40, drafter=drafter) == greedy(PROMPT, 40)


@pytest.mark.parametrize("parts", PARTS)
async def test_a_seed_gives_the_same_tokens_whatever_drafts_and_serves(
    parts: int, open_swarm: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm(latency=0.01) as swarm:
        await swarm.serve(1)
        settings = {"max_tokens": 40, "temperature": 0.7, "seed": 11}
        expected = await generate(await swarm.mesh(), PROMPT, drafter="none", **settings)
    async with open_swarm(latency=0.01) as swarm:
        await swarm.serve(parts)
        mesh = await swarm.mesh()
        for drafter in ("none", "suffix", "auto", RandomTrees(2, expected)):
            assert await generate(mesh, PROMPT, drafter=drafter, **settings) == expected
        assert await generate(mesh, PROMPT, **{**settings, "seed": 12}) != expected


async def test_greedy_output_is_that_of_transformers(
    open_swarm: Any, generate: Any, tiny_model: Path, autojump_clock: MockClock
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    async with open_swarm(latency=0.01) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        for prompt in ([3], PROMPT, [5, 9] * 120):
            output = reference.generate(
                torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            assert await generate(mesh, prompt, max_tokens=40) == output[0, len(prompt) :].tolist()
