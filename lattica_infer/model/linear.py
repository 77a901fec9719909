"""Linear layers: plain, or with weights packed once for the CPU's matrix kernels.

oneDNN multiplies a packed fp32 matrix by one row at 68 % of the memory bandwidth, F.linear at a third, and the cost
of a few rows more is small: what drafting lives from. The two operators are those that torch's own inductor
emits when it freezes weights; they are private, so they are tried once on a small matrix and left alone if they
are missing or wrong.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_EXPECTED_ROWS = 8  # what the packing is tuned for; a round verifies a handful of tokens


@functools.cache
def packing_works() -> bool:
    """Whether this build of torch packs fp32 weights and multiplies with them rightly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator)
    bias = torch.randn(24, generator=generator)
    x = torch.randn(3, 40, generator=generator)
    try:
        with torch.inference_mode():
            packed = _multiply_packed(x, _pack(weight), bias)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return packed.shape == (3, 24) and torch.allclose(packed, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


class Linear:
    """y = x W^T + b, for x [rows, in]. Holds the weight as it is given, or packed: never both.

    Args:
        weight: [out, in].
        bias: [out] or None.
        packed: use the CPU's packed form; the caller has asked `packing_works`.
    """

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, *, packed: bool) -> None:
        self._packed = packed
        self._weight = _pack(weight) if packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:  # [rows, in] -> [rows, out]
        if self._packed:
            return _multiply_packed(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    return packed


def _multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
