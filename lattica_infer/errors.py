"""Errors of inference; the branch below `lattica.errors.InferenceError`.

InferenceError ── NoRouteError (.missing) · ShardLostError (.peer .layers) · CacheFullError · WeightsError
"""

from __future__ import annotations

from collections.abc import Sequence

from lattica.errors import InferenceError
from lattica.ids import PeerId

__all__ = ["CacheFullError", "InferenceError", "NoRouteError", "ShardLostError", "WeightsError"]


class NoRouteError(InferenceError):
    """No chain of live shards covers the model. `missing` lists the layers that nobody serves."""

    def __init__(self, message: str, *, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ShardLostError(InferenceError):
    """A shard of the route died, or its connection did, in the middle of a generation.

    `peer` served `layers`. `details` is what crosses the wire of it.
    """

    def __init__(self, message: str, *, peer: PeerId | None = None, layers: range | None = None) -> None:
        super().__init__(message)
        self.peer = peer
        self.layers = layers

    @property
    def details(self) -> dict[str, object]:
        layers = None if self.layers is None else [self.layers.start, self.layers.stop]
        return {"peer": None if self.peer is None else str(self.peer), "layers": layers}


class CacheFullError(InferenceError):
    """A session asked for more cache rows than the shard grants, or than the context holds."""


class WeightsError(InferenceError):
    """A model's files are missing, damaged, or of a kind that we cannot run."""
