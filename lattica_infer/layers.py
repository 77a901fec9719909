"""Ranges of layers as users write them. No torch."""

from __future__ import annotations

import re

from lattica_infer.errors import InferenceError


def parse_layers(text: str) -> range:
    """`"0:10"` as in Python: the first ten. InferenceError when it is no range."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise InferenceError(f"layers {text!r} are no range: write 0:10 for the first ten, as in Python")
    return range(int(match[1]), int(match[2]))


def check_layers(layers: range | None, layer_count: int, model: str) -> range:
    """The layers to serve, all of them for None. InferenceError when the model has no such layers."""
    if layers is None:
        return range(layer_count)
    if layers.step == 1 and 0 <= layers.start < layers.stop <= layer_count:
        return layers
    raise InferenceError(
        f"layers {layers.start}:{layers.stop} of {model} don't exist: it has {layer_count} layers, "
        f"0:{layer_count} is all of them"
    )
