"""Rotary position embedding (arXiv 2104.09864) and the ways to stretch it, as settings and inverse frequencies.

Pure numbers, no torch: `inverse_frequencies` gives head_dim / 2 values; position p turns pair i by p * value[i].
Computed in float32 steps, as the reference implementations do, so that cached angles agree with theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lattica_infer.errors import WeightsError

Floats = npt.NDArray[np.float32]

# `dynamic` stretches only beyond the context, where we never go: inside it equals `default`.
_TYPES: Final = ("default", "linear", "dynamic", "yarn", "llama3")
_DEFAULT_THETA: Final = 10_000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Base, kind of scaling, and the scaling's own numbers (0 where the kind has no such number)."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], context_length: int) -> Rope:
        """Read `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

        Raises:
            WeightsError: a kind of scaling that we don't know, a number that is missing or out of range, or two
                spellings that disagree (libraries do on which one counts).
        """
        given = [name for name in ("rope_parameters", "rope_scaling") if settings.get(name) not in (None, {})]
        ropes = {cls._read(name, settings[name], settings, context_length) for name in given}
        if len(ropes) > 1:
            raise WeightsError(
                "config.json has rope_parameters and rope_scaling that disagree: keep one of them"
            )
        return ropes.pop() if ropes else cls._read("rope_parameters", {}, settings, context_length)

    @classmethod
    def _read(cls, name: str, scaling: object, settings: Mapping[str, Any], context_length: int) -> Rope:
        if not isinstance(scaling, Mapping):
            raise WeightsError(f"config.json has {name} = {str(scaling)[:60]!r}: it must be an object")
        nested = [key for key, value in scaling.items() if isinstance(value, Mapping)]
        if nested:
            raise WeightsError(
                f"config.json has {name} for {str(nested[0])[:60]!r} alone: one set for all layers is supported"
            )
        kind = scaling.get("rope_type", scaling.get("type")) or "default"
        if kind not in _TYPES:
            raise WeightsError(f"config.json has rope_type = {str(kind)[:60]!r}: we know {', '.join(_TYPES)}")
        if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise WeightsError("config.json has a partial_rotary_factor: models with it are not supported")
        theta = scaling.get("rope_theta", settings.get("rope_theta"))
        theta = _DEFAULT_THETA if theta is None else _number("rope_theta", theta, 2.0)
        if kind in ("default", "dynamic"):
            return cls(theta)
        factor = _number("rope factor", scaling.get("factor"), 1.0)
        if kind == "linear":
            return cls(theta, kind, factor)
        original = scaling.get("original_max_position_embeddings")
        if original is None:
            original = settings.get("original_max_position_embeddings") or context_length
        original = int(_number("original_max_position_embeddings", original, 1.0))
        if kind == "llama3":
            low = _number("low_freq_factor", scaling.get("low_freq_factor"), 1e-6)
            high = _number("high_freq_factor", scaling.get("high_freq_factor"), 1e-6)
            if high <= low:
                raise WeightsError(
                    f"config.json has high_freq_factor = {high}, not above low_freq_factor = {low}"
                )
            return cls(theta, kind, factor, original, low, high)
        truncate = scaling.get("truncate", True)
        if not isinstance(truncate, bool):
            raise WeightsError(f"config.json has truncate = {str(truncate)[:60]!r}: it must be true or false")
        return cls(
            theta,
            kind,
            factor,
            original,
            beta_fast=_number("beta_fast", scaling.get("beta_fast") or 32, 1e-6),
            beta_slow=_number("beta_slow", scaling.get("beta_slow") or 1, 1e-6),
            attention_factor=_yarn_attention_factor(scaling, factor),
            truncate=truncate,
        )

    def inverse_frequencies(self, head_dim: int) -> Floats:
        """Radians that one position turns each pair by, [head_dim / 2]."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inverse: Floats = (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        if self.type == "linear":
            return (inverse / np.float32(self.factor)).astype(np.float32)
        if self.type == "llama3":
            return self._llama3(inverse)
        if self.type == "yarn":
            return self._yarn(inverse, head_dim)
        return inverse

    def _llama3(self, inverse: Floats) -> Floats:
        """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1's model card)."""
        wavelength = 2 * math.pi / inverse
        smooth = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * inverse / self.factor + smooth * inverse
        stretched = np.where(
            wavelength > self.original_context / self.low_freq_factor, inverse / self.factor, blended
        )
        kept = np.where(wavelength < self.original_context / self.high_freq_factor, inverse, stretched)
        return kept.astype(np.float32)

    def _yarn(self, inverse: Floats, head_dim: int) -> Floats:
        """NTK by parts (arXiv 2309.00071, section 3.2): a ramp between kept and stretched pairs."""

        def pair_of(rotations: float) -> float:
            turns = self.original_context / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip(
            (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1
        )
        blended: Floats = (inverse / np.float32(self.factor) * ramp + inverse * (1 - ramp)).astype(np.float32)
        return blended


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return _number("attention_factor", given, 1e-6)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if one and all_dims:
        return mscale(_number("mscale", one, 1e-6)) / mscale(_number("mscale_all_dim", all_dims, 1e-6))
    return mscale(1.0)


def _number(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e12:
        raise WeightsError(
            f"config.json has {name} = {str(value)[:60]!r}: it must be a number, at least {least:g}"
        )
    return float(value)
