"""What the mesh says is what the model says: the real model, real connections, transformers beside it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch
import transformers

import lattica
import lattica_infer

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

PROMPTS = [
    # HumanEval/28 (Chen et al., 2021; MIT licence), as plain text
    "from typing import List\n\n\ndef concatenate(strings: List[str]) -> str:\n"
    '    """ Concatenate list of strings into a single string\n    >>> concatenate([])\n    \'\'\n'
    "    >>> concatenate(['a', 'b', 'c'])\n    'abc'\n    \"\"\"\n",
    # GSM8K style, and a message in chat form
    "A farmer has 3 fields with 12 rows each, and 8 plants in every row. How many plants are there?",
    [{"role": "user", "content": "Name three colours and say where each is seen in nature."}],
]


@pytest.fixture(scope="module")
def reference(smollm2: Any) -> Any:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32).eval()


def config(*bootstrap: str) -> lattica.NodeConfig:
    return lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=list(bootstrap), data_dir=None)


async def test_greedy_tokens_of_three_shards_are_those_of_transformers(smollm2: Any, reference: Any) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(lattica.open_node(config()))
        nodes = [
            await stack.enter_async_context(lattica.open_node(config(*first.addresses))) for _ in range(3)
        ]
        for index, node in enumerate((first, *nodes[:2])):
            await node.online()
            layers = range(10 * index, 10 * index + 10)
            await stack.enter_async_context(lattica_infer.serve_shard(node, smollm2.folder, layers=layers))
        mesh = await stack.enter_async_context(lattica_infer.open_model(nodes[2], smollm2.folder))
        for prompt in PROMPTS:
            ids = mesh.tokenizer.encode(prompt) if isinstance(prompt, str) else mesh.tokenizer.chat(prompt)
            with torch.inference_mode():
                out = reference.generate(
                    torch.tensor([ids]), max_new_tokens=48, do_sample=False, pad_token_id=0
                )
            expected = [token for token in out[0, len(ids) :].tolist() if token not in mesh.tokenizer.end_ids]
            for drafter in ("none", "auto"):
                async with mesh.generate(ids, max_tokens=48, drafter=drafter) as stream:
                    assert [token.id async for token in stream] == expected, drafter
