"""Errors of inference; the branch below `lattica.errors.InferenceError`.

InferenceError ── NoRouteError (.missing) · ShardLostError · CacheFullError · WeightsError
"""

from __future__ import annotations

from collections.abc import Sequence

from lattica.errors import InferenceError

__all__ = ["CacheFullError", "InferenceError", "NoRouteError", "ShardLostError", "WeightsError"]


class NoRouteError(InferenceError):
    """No chain of live shards covers the model. `missing` lists the layers that nobody serves."""

    def __init__(self, message: str, *, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ShardLostError(InferenceError):
    """A shard of the route died, or its connection did, in the middle of a generation."""


class CacheFullError(InferenceError):
    """A session asked for more cache rows than the shard grants, or than the context holds."""


class WeightsError(InferenceError):
    """A model's files are missing, damaged, or of a kind that we cannot run."""
