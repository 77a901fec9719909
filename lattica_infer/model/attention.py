"""Grouped-query attention (arXiv 2305.13245) over a cache, for a chain or a tree of new tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lattica_infer.model.config import ModelConfig

# Scores held at once: 16 MiB in fp32. torch's fused kernel never holds them: with 256 tokens behind 7,000 a whole pass
# takes half the time, with few tokens longer.
_MAX_SCORES: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the new tokens of one forward pass stand, and what each of them sees.

    Attributes:
        cos, sin: of each token's angles, [tokens, 1, head_dim]; sin's first half is negated, so that
            x cos + swapped(x) sin turns each pair (i, i + head_dim / 2).
        masks: per window size, what is added to the scores: 0 or -inf, [tokens, committed + tokens]. None where
            everything is seen.
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None]


def place(
    config: ModelConfig,
    inverse_frequencies: Tensor,
    committed: int,
    count: int,
    parents: Sequence[int] | None,
    dtype: torch.dtype,
) -> Placement:
    """Positions and masks for `count` tokens behind `committed` rows.

    A token sees the prefix, its ancestors and itself: for a chain (`parents` None) that is causal attention.

    Raises:
        ValueError: `parents` are not `count` numbers, each -1 or an earlier token.
    """
    device = inverse_frequencies.device
    depth, sees = _chain(count) if parents is None else _tree(count, parents)
    positions = torch.from_numpy(depth + committed).to(device)
    angles = positions.float()[:, None] * inverse_frequencies  # [tokens, head_dim / 2]
    half_sin = angles.sin() * config.rope.attention_factor
    cos = torch.cat([angles.cos() * config.rope.attention_factor] * 2, -1).to(dtype)[:, None]
    sin = torch.cat([-half_sin, half_sin], -1).to(dtype)[:, None]
    masks: dict[int | None, Tensor | None] = {}
    for window in set(config.windows):
        masks[window] = _mask(sees, depth, committed, window, dtype, device)
    return Placement(cos, sin, masks)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(head_dim) + mask) V, without repeating keys for the heads that share them.

    Args:
        queries: [heads, tokens, head_dim]; head h reads keys of h // (heads / kv_heads).
        keys, values: [kv_heads, rows, head_dim].
        mask: [tokens, rows], or None.

    Returns:
        [heads, tokens, head_dim].
    """
    heads, tokens, dim = queries.shape
    kv_heads, rows, _ = keys.shape
    if heads * tokens * rows > _MAX_SCORES:
        mixed = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return mixed[0]
    grouped = queries.reshape(kv_heads, -1, dim) / math.sqrt(dim)  # a group's heads one after the other
    scores = torch.bmm(grouped, keys.transpose(1, 2))  # [kv_heads, group * tokens, rows]
    if mask is not None:
        scores.view(heads, tokens, rows).add_(mask)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(heads, tokens, dim)


def _chain(count: int) -> tuple[np.ndarray, np.ndarray | None]:
    return np.arange(count), None


def _tree(count: int, parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Depth of each node below the prefix, and who sees whom: [nodes, nodes], True for ancestors and itself."""
    depth = np.zeros(count, dtype=np.int64)
    sees = np.eye(count, dtype=bool)
    if len(parents) != count:
        raise ValueError(f"{len(parents)} parents for {count} tokens")
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"token {node} has parent {parent}: it must be an earlier one, or -1")
        if parent >= 0:
            depth[node] = depth[parent] + 1
            sees[node] |= sees[parent]
    return depth, sees


def _mask(
    sees: np.ndarray | None,
    depth: np.ndarray,
    committed: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    count = len(depth)
    everything = sees is None and count == 1
    if everything and (window is None or committed < window):
        return None
    allowed = np.ones((count, committed + count), dtype=bool)
    allowed[:, committed:] = np.tri(count, dtype=bool) if sees is None else sees
    if window is not None:
        of_keys = np.concatenate([np.arange(committed), depth + committed])
        allowed &= of_keys[None, :] > (depth + committed)[:, None] - window
    mask = torch.zeros(allowed.shape, dtype=dtype)
    return mask.masked_fill_(~torch.from_numpy(allowed), -math.inf).to(device)
