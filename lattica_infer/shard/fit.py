"""Whether a range of layers fits here: device, dtype and bytes, checked before anything is loaded."""

from __future__ import annotations

import math
from typing import Final

import torch

from lattica_infer.errors import InferenceError
from lattica_infer.model.config import ModelConfig, stage_tensors
from lattica_infer.shard.sessions import TREE_ROWS, SessionLimits

DEFAULT_CACHE_BYTES: Final = 2 << 30  # of all sessions of a shard, unless max_memory leaves less
_FEWEST_ROWS: Final = 2 * TREE_ROWS  # a cache that holds less serves nobody

_DTYPES: Final = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def check_device(device: str) -> torch.device:
    """The device of this name. InferenceError when this machine has none."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a build without CUDA
        raise InferenceError(
            f"there is no device {device!r} here ({str(error).splitlines()[0]}); cpu is always there"
        ) from error
    return found


def check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; for None the one that `Stage` takes on this device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise InferenceError(f"dtype {dtype!r} is not known: take fp32, bf16 or fp16")
    return _DTYPES[dtype]


def weight_bytes(config: ModelConfig, layers: range, dtype: torch.dtype) -> int:
    """Memory that the stage's tensors take."""
    return sum(math.prod(shape) for shape in stage_tensors(config, layers).values()) * dtype.itemsize


def row_bytes(config: ModelConfig, layers: range, dtype: torch.dtype) -> int:
    """Memory that one row of the stage's cache takes: a key and a value in each layer."""
    return 2 * len(layers) * config.num_kv_heads * config.head_dim * dtype.itemsize


def session_limits(
    config: ModelConfig, layers: range, dtype: torch.dtype, max_memory: int | None
) -> SessionLimits:
    """What sessions may take of `max_memory` bytes beside the weights.

    Raises:
        InferenceError: the weights and a small cache do not fit.
    """
    weights, row = weight_bytes(config, layers, dtype), row_bytes(config, layers, dtype)
    cache_bytes = DEFAULT_CACHE_BYTES
    if max_memory is not None:
        cache_bytes = min(cache_bytes, max_memory - weights)
        if cache_bytes < _FEWEST_ROWS * row:
            needed = weights + _FEWEST_ROWS * row
            raise InferenceError(
                f"layers {layers.start}:{layers.stop} need {needed / 1e6:.0f} MB with the smallest cache, "
                f"and max_memory is {max_memory / 1e6:.0f} MB: serve fewer layers, or allow more"
            )
    return SessionLimits.for_memory(cache_bytes, row_bytes=row, context=config.context_length)
