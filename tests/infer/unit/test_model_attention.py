"""Attention against its formula, and who sees whom."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lattica_infer.model.attention import attend, place
from lattica_infer.model.config import ModelConfig

torch.set_num_threads(1)

SETTINGS = {
    "model_type": "mistral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIG = ModelConfig.from_dict(SETTINGS)


def seen(committed: int, parents: list[int] | None, count: int, window: int | None) -> list[set[int]]:
    """Which rows each token sees."""
    frequencies = torch.from_numpy(CONFIG.rope.inverse_frequencies(CONFIG.head_dim))
    mask = place(CONFIG, frequencies, committed, count, parents, torch.float32).masks[window]
    if mask is None:
        return [set(range(committed + count))] * count
    return [set(torch.nonzero(row == 0).flatten().tolist()) for row in mask]


def test_a_token_sees_the_prefix_its_ancestors_and_itself() -> None:
    tree = [-1, 0, 0, 1, -1, 4]
    assert seen(2, tree, 6, None) == [
        {0, 1, 2},
        {0, 1, 2, 3},
        {0, 1, 2, 4},
        {0, 1, 2, 3, 5},
        {0, 1, 6},
        {0, 1, 6, 7},
    ]


def test_a_window_counts_positions_not_rows() -> None:
    tree = [-1, -1, -1, 2, 3, 4]  # the last stands at position 5, and its ancestor in row 4 at position 2
    assert seen(2, tree, 6, 3) == [{0, 1, 2}, {0, 1, 3}, {0, 1, 4}, {1, 4, 5}, {4, 5, 6}, {5, 6, 7}]
    assert seen(9, None, 1, 3) == [{7, 8, 9}]


@pytest.mark.parametrize("parents", [[0], [-2], [-1, 2, 0], [-1, 1]])
def test_a_parent_that_does_not_come_first_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="it must be an earlier one, or -1"):
        seen(0, parents, len(parents), None)


def test_each_token_has_a_parent() -> None:
    with pytest.raises(ValueError, match="2 parents for 3 tokens"):
        seen(0, [-1, 0], 3, None)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 50), (7, 50), (600, 2000)])  # the last: more than are held
def test_attention_is_its_formula(tokens: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, tokens, 16, generator=generator)
    keys, values = (torch.randn(2, rows, 16, generator=generator) for _ in "kv")
    visible = torch.rand(tokens, rows, generator=generator) < 0.5
    visible[:, 0] = True
    mask = torch.zeros(tokens, rows).masked_fill(~visible, -math.inf)
    expected = by_formula(queries, keys, values, mask)
    torch.testing.assert_close(attend(queries, keys, values, mask), expected, rtol=1e-5, atol=1e-5)


def by_formula(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    heads = []
    for head, query in enumerate(queries.double()):
        key, value = keys[head // 2].double(), values[head // 2].double()
        heads.append(torch.softmax(query @ key.T / math.sqrt(query.shape[-1]) + mask, -1) @ value)
    return torch.stack(heads).float()
