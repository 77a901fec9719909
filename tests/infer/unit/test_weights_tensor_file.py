"""safetensors headers: ours against the library, and damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lattica_infer.errors import WeightsError
from lattica_infer.model.tensor_file import (
    MAX_HEADER_BYTES,
    TensorSpec,
    canonical_header,
    canonical_order,
    read_tensor_table,
    read_tensor_tables,
)

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
SPECS = st.builds(
    TensorSpec,
    name=NAMES.filter(lambda name: name != "__metadata__" and name.isprintable()),
    dtype=st.sampled_from(sorted(TORCH_DTYPES)),
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
)
SPEC_SETS = st.lists(SPECS, min_size=1, max_size=6, unique_by=lambda spec: spec.name)


def tensors_of(specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    count = 0
    tensors = {}
    for spec in specs:
        values = torch.arange(count, count + spec.elements).reshape(spec.shape)
        tensors[spec.name] = values.to(TORCH_DTYPES[spec.dtype])
        count += spec.elements
    return tensors


@given(SPEC_SETS)
def test_the_library_reads_canonical_files(specs: list[TensorSpec]) -> None:
    tensors = tensors_of(specs)
    content = canonical_header(specs)
    for spec in canonical_order(specs):
        content += tensors[spec.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    read = safetensors.torch.load(content)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())


@given(SPEC_SETS)
def test_our_reader_finds_what_the_library_wrote(tmp_path_factory: Any, specs: list[TensorSpec]) -> None:
    file = tmp_path_factory.mktemp("written") / "some.safetensors"
    tensors = tensors_of(specs)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    content = file.read_bytes()
    table = {tensor.spec.name: tensor for tensor in read_tensor_table(file)}
    assert {tensor.spec for tensor in table.values()} == set(specs)
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert content[table[name].start :][: len(raw)] == raw


def test_the_order_of_names_does_not_matter() -> None:
    specs = [TensorSpec("b", "F16", (3,)), TensorSpec("a", "F16", (1,)), TensorSpec("c", "F32", (2,))]
    assert canonical_header(specs) == canonical_header(reversed(specs))
    assert [spec.name for spec in canonical_order(specs)] == ["c", "a", "b"]


def test_canonical_headers_are_what_the_wire_page_says() -> None:
    specs = [TensorSpec("b", "BF16", (3,)), TensorSpec("é", "BF16", ()), TensorSpec("z", "F32", (2, 3))]
    assert canonical_header(specs) == (
        b"\xb0\x00\x00\x00\x00\x00\x00\x00"
        b'{"z":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]},'
        b'"\xc3\xa9":{"dtype":"BF16","shape":[],"data_offsets":[30,32]}}       '
    )


def entry(start: int, end: int, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(header: Any, data_bytes: int, *, length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file = tmp_path / "model.safetensors"
        size = len(text) if length is None else length
        file.write_bytes(size.to_bytes(8, "little") + text + bytes(data_bytes))
        return file

    return write


def test_a_file_with_metadata_and_padding_is_read(write: Callable[..., Path]) -> None:
    file = write(json.dumps({"__metadata__": {"a": "b"}, "t": entry(0, 8)}).encode() + b"   ", 8)
    assert [tensor.spec for tensor in read_tensor_table(file)] == [TensorSpec("t", "F32", (2,))]


@pytest.mark.parametrize(
    ("header", "data_bytes", "complaint"),
    [
        (b"", 0, "not JSON"),
        (b"\xff", 0, "not JSON"),
        (b"[" * 10_000, 0, "not JSON"),
        (b"[]", 0, "not a JSON object"),
        (b'{"t": 1}', 0, "no way that safetensors knows"),
        (b'{"t": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "t": 1}', 4, "twice"),
        ({"t": entry(0, 8)}, 7, "truncated or damaged"),
        ({"t": entry(0, 8)}, 9, "truncated or damaged"),
        ({"t": entry(4, 8)}, 8, "overlaps another or leaves a hole"),
        ({"t": entry(0, 8), "u": entry(4, 8)}, 8, "overlaps another or leaves a hole"),
        ({"t": entry(0, 8, shape=[3])}, 8, "its shape needs 12"),
        ({"t": entry(0, 8, shape=[-2])}, 8, "out of range"),
        ({"t": entry(0, 8, shape=[True, 2])}, 8, "out of range"),
        ({"t": entry(0, 8, shape=[1 << 70])}, 8, "out of range"),
        ({"t": entry(0, 0, shape=[0])}, 0, "impossible shape"),
        ({"t": entry(0, 4, shape=[1, 1, 1, 1, 1])}, 4, "impossible shape"),
        ({"t": entry(0, 8, dtype="I64", shape=[1])}, 8, "F32, F16 or BF16"),
        ({"": entry(0, 4)}, 4, "name has 1 to"),
        ({"n" * 257: entry(0, 4)}, 4, "name has 1 to"),
        (b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "name has 1 to"),
    ],
)
def test_a_damaged_file_is_refused(
    write: Callable[..., Path], header: Any, data_bytes: int, complaint: str
) -> None:
    with pytest.raises(WeightsError, match=complaint):
        read_tensor_table(write(header, data_bytes))


@pytest.mark.parametrize("length", [1000, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is_is_refused_unread(
    write: Callable[..., Path], length: int
) -> None:
    with pytest.raises(WeightsError, match=f"claims {length} of"):
        read_tensor_table(write({"t": entry(0, 8)}, 8, length=length))


@pytest.mark.parametrize("size", range(9))
def test_the_smallest_files_are_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(bytes(size))
    with pytest.raises(WeightsError):
        read_tensor_table(tmp_path / "f")


@given(st.data())
def test_mutated_headers_raise_nothing_but_weights_error(tiny_model: Path, data: st.DataObject) -> None:
    content = bytearray((tiny_model / "model.safetensors").read_bytes()[:2000])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content[1:8] = bytes(7)  # so that the header's end stays inside
    file = tiny_model.parent / "mutated"
    file.write_bytes(content)
    with pytest.raises(WeightsError):
        read_tensor_table(file)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        safetensors.torch.save_file({"t": torch.ones(2)}, file)
    with pytest.raises(WeightsError, match="stands in both"):
        read_tensor_tables(files)
