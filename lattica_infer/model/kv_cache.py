"""Keys and values of one session: a committed prefix, and scratch rows behind it.

A forward pass writes its nodes' rows as scratch; `commit` keeps a path of them and drops the rest. So a draft tree
costs nothing to take back, and a rejected branch leaves no trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lattica_infer.errors import CacheFullError
from lattica_infer.model.config import ModelConfig

_FIRST_ROWS = 256  # memory grows by doubling from here: a short chat in a long context stays small


class KVCache:
    """Keys and values for a range of layers, [layers, batch, kv_heads, rows, head_dim] each.

    Args:
        rows: the most rows that it may ever hold, scratch included; memory is taken as they fill.

    Raises:
        ValueError: `rows` or `batch` is not positive.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        *,
        rows: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if rows < 1 or batch < 1:
            raise ValueError(f"a cache of {rows} rows and batch {batch} holds nothing")
        self.rows = rows
        self.committed = 0
        self.scratch = 0
        shape = (len(layers), batch, config.num_kv_heads, min(rows, _FIRST_ROWS), config.head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._new: list[tuple[Tensor, ...]] = []  # per layer: where the scratch rows go; keys, values
        self._all: list[tuple[Tensor, ...]] = []  # per layer: the prefix and them

    @property
    def memory_bytes(self) -> int:
        """What it takes now."""
        return 2 * self._keys.numel() * self._keys.element_size()

    def reserve(self, count: int) -> None:
        """Drop the scratch rows and make room for `count` new ones.

        Raises:
            CacheFullError: they don't fit; the cache is as it was.
        """
        start, end = self.committed, self.committed + count
        if end > self.rows:
            raise CacheFullError(
                f"the session's cache has {self.rows} rows, {start} are taken and {count} more are asked for:"
                " ask for fewer tokens, or open the session with more rows"
            )
        if end > self._keys.shape[3]:
            self._grow(end)
        self.scratch = count
        # Views of every layer at once: cheaper than slicing layer by layer in `write`.
        both = [stored.flatten(1, 2) for stored in (self._keys, self._values)]
        self._new = [stored[:, :, start:end].unbind(0) for stored in both]
        self._all = [stored[:, :, :end].unbind(0) for stored in both]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the reserved rows of one layer in place.

        Args:
            layer: index within this cache's range.
            keys, values: [batch * kv_heads, scratch, head_dim].

        Returns:
            All keys and values of the layer, prefix first: [batch * kv_heads, committed + scratch, head_dim].
        """
        self._new[0][layer].copy_(keys)
        self._new[1][layer].copy_(values)
        return self._all[0][layer], self._all[1][layer]

    def commit(self, path: Sequence[int]) -> None:
        """Move these scratch rows, in this order, behind the prefix; drop the others.

        Raises:
            ValueError: the path is not ascending, or names rows that are not there.
        """
        count = len(path)
        ascending = all(a < b for a, b in itertools.pairwise(path))
        if count and not (ascending and path[0] >= 0 and path[-1] < self.scratch):
            raise ValueError(
                f"cannot commit rows {list(path)[:8]} of {self.scratch}: they must ascend within them"
            )
        start = self.committed
        if count and path[-1] != count - 1:  # else they stand where they belong
            index = torch.tensor(path, device=self._keys.device) + start
            for stored in (self._keys, self._values):
                stored[:, :, :, start : start + count] = stored.index_select(3, index)
        self.committed = start + count
        self.scratch = 0

    def _grow(self, needed: int) -> None:
        capacity = min(self.rows, max(needed, 2 * self._keys.shape[3]))
        grown = []
        for old in (self._keys, self._values):
            shape = (*old.shape[:3], capacity, old.shape[4])
            new = torch.zeros(shape, dtype=old.dtype, device=old.device)
            new[:, :, :, : self.committed] = old[:, :, :, : self.committed]
            grown.append(new)
        self._keys, self._values = grown
