"""torch tensors across a call: every dtype, no copy where none is needed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lattica.errors import LocalProtocolError
from lattica.rpc import Call, Service
from lattica.rpc.codec import Tensor, decode, encode, to_torch
from lattica.rpc.tensors import DTYPES, aligned_buffer

NAMES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16", "bool": "bool"}


def through(value: object) -> Any:
    array, *parts = encode(value)
    joined = b"".join(parts)
    section = aligned_buffer(len(joined))
    section[:] = joined
    return decode(array, section)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_survives(dtype: str, shape: tuple[int, ...]) -> None:
    kind = getattr(
        torch, NAMES.get(dtype, dtype.replace("i", "int").replace("u", "uint").replace("uintnt", "uint"))
    )
    sent = torch.randint(0, 2, shape).to(kind)
    got = to_torch(through(sent))
    assert got.dtype == kind
    assert got.shape == sent.shape
    assert torch.equal(got.view(torch.uint8) if shape else got, sent.view(torch.uint8) if shape else sent)


def test_bfloat16_arrives_as_torch() -> None:
    sent = torch.randn(7, dtype=torch.bfloat16)
    assert torch.equal(through([sent])[0], sent)


def test_to_torch_shares_memory_and_does_not_warn() -> None:
    got = through(torch.arange(1000.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = to_torch(got)
    assert tensor.data_ptr() == got.ctypes.data


def test_contiguous_tensors_are_sent_from_where_they_are() -> None:
    sent = torch.arange(5000, dtype=torch.int64)
    part = encode(sent)[1]
    assert isinstance(part, memoryview)
    sent[0] = 99
    assert part[0] == 99


def test_strides_gradients_and_views_do_not_matter() -> None:
    sent = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    assert torch.equal(to_torch(through(sent)), sent.detach())


@pytest.mark.parametrize(
    "value", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()], ids=["complex", "sparse"]
)
def test_other_tensors_are_refused_by_name(value: torch.Tensor) -> None:
    with pytest.raises(LocalProtocolError, match=r"torch\."):
        encode(value)


def test_a_parameter_annotated_as_torch_is_given_one() -> None:
    service = Service("s")

    @service.method
    async def scale(call: Call, tensor: torch.Tensor, by: float) -> None: ...

    assert service.methods["scale"].torch_at == (0,)


def test_read_only_bytes_are_copied_for_torch() -> None:
    tensor = Tensor("bf16", (2,), memoryview(b"\x80\x3f\x00\x40"))
    assert tensor.torch().tolist() == [1.0, 2.0]
    assert tensor.numpy().tolist() == [0x3F80, 0x4000]
