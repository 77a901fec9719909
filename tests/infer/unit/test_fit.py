"""What does not fit on this machine is refused before it is loaded, in words that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lattica_infer.cli import parse_size
from lattica_infer.errors import InferenceError
from lattica_infer.layers import check_layers, parse_layers
from lattica_infer.shard.fit import check_device, check_dtype, row_bytes, session_limits, weight_bytes
from lattica_infer.weights.loading import load_stage_tensors
from lattica_infer.weights.store import ModelStore

FP32, BF16 = torch.float32, torch.bfloat16


def test_weight_bytes_are_those_of_the_tensors(tiny_model: Path) -> None:
    config = ModelStore().resolve(tiny_model).config
    for layers in (range(2), range(2, 5), range(5)):
        tensors = load_stage_tensors(tiny_model, layers).values()
        assert weight_bytes(config, layers, FP32) == sum(tensor.numel() for tensor in tensors) * 4


def test_memory_that_is_left_bounds_the_cache(tiny_model: Path) -> None:
    config, layers = ModelStore().resolve(tiny_model).config, range(5)
    weights, row = weight_bytes(config, layers, FP32), row_bytes(config, layers, FP32)
    limits = session_limits(config, layers, FP32, weights + 1000 * row)
    assert (limits.rows, limits.rows_per_session) == (1000, config.context_length + 256)
    with pytest.raises(InferenceError, match=r"layers 0:5 need \d+ MB .* serve fewer layers"):
        session_limits(config, layers, FP32, weights + 100 * row)


@pytest.mark.parametrize("layers", [range(3, 9), range(5, 6), range(2, 2), range(-1, 2), range(0, 4, 2)])
def test_layers_that_do_not_exist_are_refused(layers: range) -> None:
    with pytest.raises(InferenceError, match=r"of tiny don't exist: it has 5 layers, 0:5 is all of them"):
        check_layers(layers, 5, "tiny")


def test_layers_are_read_as_python_reads_them() -> None:
    assert parse_layers("0:10") == range(10)
    assert check_layers(None, 5, "tiny") == range(5)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "7:3", "-1:3", "0:5:2", "a:b"])
def test_what_is_no_range_of_layers_is_refused(text: str) -> None:
    with pytest.raises(InferenceError, match="are no range: write 0:10"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("123", 123)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4TB", "four"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Exception, match="is no size: write 4GB"):
        parse_size(text)


def test_a_dtype_follows_the_device_unless_it_is_named() -> None:
    assert check_dtype(None, torch.device("cpu")) == FP32
    assert check_dtype(None, torch.device("cuda")) == BF16
    assert check_dtype("bf16", torch.device("cpu")) == check_dtype(BF16, torch.device("cpu")) == BF16
    with pytest.raises(InferenceError, match="dtype 'int3' is not known: take fp32, bf16 or fp16"):
        check_dtype("int3", torch.device("cpu"))


@pytest.mark.parametrize("device", ["abacus", "meta:x", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(InferenceError, match=f"there is no device '{device}' here"):
        check_device(device)
