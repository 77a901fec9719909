"""One language model across many peers: serve some of its layers, or ask for tokens.

Names load when they are first used (PEP 562): `import lattica_infer` imports neither torch nor the network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lattica_infer.client.generation import GenerationStats, GenerationStream, Token
    from lattica_infer.client.service import Mesh, open_model
    from lattica_infer.errors import (
        CacheFullError,
        InferenceError,
        NoRouteError,
        ShardLostError,
        WeightsError,
    )
    from lattica_infer.shard.service import Shard, serve_shard

_HOMES = {
    "lattica_infer.client.generation": ("GenerationStats", "GenerationStream", "Token"),
    "lattica_infer.client.service": ("Mesh", "open_model"),
    "lattica_infer.errors": (
        "CacheFullError",
        "InferenceError",
        "NoRouteError",
        "ShardLostError",
        "WeightsError",
    ),
    "lattica_infer.shard.service": ("Shard", "serve_shard"),
}
_ROOMS = ("errors", "spec")  # modules that readers reach as `lattica_infer.errors`
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CacheFullError",
    "GenerationStats",
    "GenerationStream",
    "InferenceError",
    "Mesh",
    "NoRouteError",
    "Shard",
    "ShardLostError",
    "Token",
    "WeightsError",
    "open_model",
    "serve_shard",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"lattica_infer.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lattica_infer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
