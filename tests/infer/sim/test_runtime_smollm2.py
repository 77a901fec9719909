"""The real model across three shards: the tokens of `transformers`, plainly and speculatively."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trio.testing import MockClock

PROMPTS = {
    "code": 'def has_close_elements(numbers, threshold):\n    """Are two numbers closer than threshold?"""\n',
    "chat": [{"role": "user", "content": "List three colours of the sea, then repeat the list."}],
}


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", PROMPTS)
async def test_smollm2_on_three_shards_says_what_transformers_says(
    name: str, smollm2: Any, open_swarm: Any, generate: Any, autojump_clock: MockClock
) -> None:
    torch.set_num_threads(1)
    reference = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32).eval()
    async with open_swarm(latency=0.01, model=smollm2.folder, layers=30) as swarm:
        await swarm.serve(3)
        mesh = await swarm.mesh()
        prompt = PROMPTS[name]
        ids = mesh.tokenizer.encode(prompt) if isinstance(prompt, str) else mesh.tokenizer.chat(prompt)
        output = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0)[
            0, len(ids) :
        ].tolist()
        expected = output[
            : next((at for at, token in enumerate(output) if token in mesh.tokenizer.end_ids), 64)
        ]
        for drafter in ("none", "suffix"):
            assert await generate(mesh, ids, max_tokens=64, drafter=drafter) == expected
