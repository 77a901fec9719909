"""The cache against a list of rows that does the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lattica_infer.errors import CacheFullError
from lattica_infer.model.config import ModelConfig
from lattica_infer.model.kv_cache import KVCache

torch.set_num_threads(1)

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 8,
        "max_position_embeddings": 8,
    }
)
LAYERS, BATCH, HEADS, DIM = range(1, 3), 3, 2, 4


def fresh(count: int, first: int) -> torch.Tensor:
    """Rows that no other pass wrote, [batch * heads, count, dim]."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)[None, :, None]
    return numbers + torch.arange(BATCH * HEADS)[:, None, None] / 16 + torch.zeros(DIM)


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.sets(st.integers(0, 399), max_size=400) | st.just("all")),
        max_size=6,
    )
)
def test_what_was_committed_is_read_back_in_order(passes: list[tuple[int, set[int] | str]]) -> None:
    cache = KVCache(CONFIG, LAYERS, rows=1000, batch=BATCH)
    held = torch.empty(BATCH * HEADS, 0, DIM)
    written = 0
    for count, wanted in passes:
        before = cache.memory_bytes
        if held.shape[1] + count > 1000:
            with pytest.raises(CacheFullError, match=f"{held.shape[1]} are taken and {count} more"):
                cache.reserve(count)
            assert cache.memory_bytes == before
            continue
        cache.reserve(count)
        new = fresh(count, written)
        written += count
        for layer in range(len(LAYERS)):
            keys, values = cache.write(layer, new + layer * 1e5, -new)
            assert torch.equal(keys[:, held.shape[1] :], new + layer * 1e5)
            assert torch.equal(values, torch.cat([held, -new], 1))
        path = range(count) if isinstance(wanted, str) else sorted(row for row in wanted if row < count)
        cache.commit(path)
        held = torch.cat([held, -new[:, list(path)]], 1)
        assert (cache.committed, cache.scratch) == (held.shape[1], 0)
        assert cache.memory_bytes <= 2 * len(LAYERS) * BATCH * HEADS * DIM * 4 * 1000


def test_memory_is_taken_as_rows_fill() -> None:
    cache = KVCache(CONFIG, LAYERS, rows=1_000_000)
    opened = cache.memory_bytes
    cache.reserve(100)
    assert cache.memory_bytes == opened < 1_000_000
    cache.reserve(10_000)
    assert opened < cache.memory_bytes < 3 * 10_000 * 2 * len(LAYERS) * HEADS * DIM * 4


@pytest.mark.parametrize(("rows", "batch"), [(0, 1), (1, 0), (-1, 1)])
def test_a_cache_that_holds_nothing_is_a_bug_of_ours(rows: int, batch: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        KVCache(CONFIG, LAYERS, rows=rows, batch=batch)
