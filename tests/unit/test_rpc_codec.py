"""Values survive the wire, and bytes from a peer raise RemoteProtocolError and nothing else."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica.protocols import INLINE_BYTES, MAX_FRAME_VALUES, MAX_NESTING
from lattica.rpc.codec import Tensor, decode, encode

DTYPES = ["f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ">f4", ">i8"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.binary(min_size=INLINE_BYTES, max_size=INLINE_BYTES + 70)
)
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    )
)
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def through(value: object) -> Any:
    array, *section = encode(value)
    return decode(array, b"".join(section))


def same(sent: object, got: object) -> bool:
    if isinstance(sent, np.ndarray):
        little = sent.astype(sent.dtype.newbyteorder("<"), order="C")
        alike = isinstance(got, np.ndarray) and got.shape == sent.shape and got.dtype.name == sent.dtype.name
        return alike and got.tobytes() == little.tobytes()
    if isinstance(sent, float):
        return isinstance(got, float) and struct.pack("d", sent) == struct.pack("d", got)
    if isinstance(sent, list):
        return isinstance(got, list) and len(sent) == len(got) and all(map(same, sent, got))
    if isinstance(sent, dict):
        return (
            isinstance(got, dict) and list(sent) == list(got) and all(map(same, sent.values(), got.values()))
        )
    return type(sent) is type(got) and sent == got


@given(values)
def test_values_keep_type_and_bits(value: Any) -> None:
    assert same(value, through(value))


@given(values, st.data())
def test_changed_bytes_raise_only_remote_protocol_error(value: Any, data: st.DataObject) -> None:
    array, *rest = encode(value)
    section = b"".join(rest)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(array) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        new = data.draw(st.binary(min_size=1, max_size=3))
        array = {
            "change": array[:at] + new + array[at + 1 :],
            "cut": array[: at + 1],
            "insert": array[:at] + new + array[at:],
        }[kind]
    section = section[: data.draw(st.integers(0, len(section)))]
    with contextlib.suppress(RemoteProtocolError):
        through(decode(array, section))  # whatever is let in can be sent on


@given(st.binary(max_size=300), st.binary(max_size=200))
def test_random_bytes_raise_only_remote_protocol_error(array: bytes, section: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(array, section)


@given(st.binary(max_size=60), st.integers(70, 100))
def test_random_bytes_behind_many_good_values_raise_only_remote_protocol_error(
    tail: bytes, count: int
) -> None:
    head = b"\xdc" + struct.pack(">H", count + 1) + msgpack.packb("x" * 60) * count
    with contextlib.suppress(RemoteProtocolError):
        decode(head + tail)


@given(st.lists(plain, min_size=1, max_size=4))
def test_the_scan_of_large_arrays_agrees_with_msgpack(value: list[Any]) -> None:
    padded = [*value, *(["0123456789"] * 500)]  # over the size from which arrays are scanned
    assert same(padded, through(padded))


@pytest.mark.parametrize(
    "head",
    [b"\xdd\x00\x0f\xff\xff", b"\xdc\xff\xff", b"\xdf\x00\x07\xff\xff\xa0"],
    ids=["list32", "list16", "map32"],
)
def test_nested_claims_take_no_memory(head: bytes) -> None:
    hostile = head * 200_000
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode(hostile)
        with pytest.raises(RemoteProtocolError):
            decode(hostile[:4096])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2**20


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(b"\x91" * (MAX_NESTING + 1) + b"\xc0", id="nested lists"),
        pytest.param(b"\x81\xa1a" * (MAX_NESTING + 1) + b"\xc0", id="nested maps"),
        pytest.param(b"\x91" * 5000 + b"\xc0", id="nested lists, scanned"),
        pytest.param(b"\x81\x01\x02", id="int key"),
        pytest.param(b"\x81\xc4\x01a\x02", id="bytes key"),
        pytest.param(b"\x91\xd6\xff\0\0\0\0", id="timestamp"),
        pytest.param(b"\xd4\x05\0", id="unknown extension"),
        pytest.param(b"\xc1", id="no type"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc0\xc0", id="two values"),
        pytest.param(b"\xa1\xff", id="not UTF-8"),
        pytest.param(
            b"\xdd" + struct.pack(">I", MAX_FRAME_VALUES) + b"\xc0" * MAX_FRAME_VALUES, id="too many values"
        ),
    ],
)
def test_what_encode_never_writes_is_refused(hostile: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(hostile)


def tensor(dtype: object, shape: object, offset: object, size: object) -> bytes:
    return bytes(msgpack.packb(msgpack.ExtType(1, msgpack.packb([dtype, shape, offset, size]))))


@pytest.mark.parametrize(
    ("array", "section_bytes"),
    [
        pytest.param(tensor("f32", [2], 0, 12), 12, id="size is not the shape's"),
        pytest.param(tensor("f32", [-2, -2], 0, 16), 16, id="negative sizes"),
        pytest.param(tensor("f32", [2**62, 2**62, 0], 0, 0), 0, id="sizes beyond memory"),
        pytest.param(tensor("f32", [True], 0, 4), 4, id="a size that is a bool"),
        pytest.param(tensor("f32", [1] * 9, 0, 4), 4, id="too many dimensions"),
        pytest.param(tensor("O", [1], 0, 8), 8, id="objects"),
        pytest.param(tensor("f32", [1], 4, 4), 8, id="not aligned"),
        pytest.param(tensor("f32", [1], 64, 4), 68, id="not at the start"),
        pytest.param(tensor("f32", [1], 4, 4), 4, id="an offset beside its buffer"),
        pytest.param(tensor("f32", [1], 0, 4), 3, id="section too short"),
        pytest.param(tensor("f32", [1], 0, 4), 5, id="bytes that nobody names"),
        pytest.param(b"\x92" + tensor("f32", [1], 0, 4) * 2, 4, id="two tensors in one place"),
        pytest.param(b"\x92" + tensor("u8", [1], 0, 1) + tensor("u8", [1], 64, 1), 65, id="gap not zero"),
        pytest.param(tensor("bool", [1], 0, 1), 1, id="a bool that is neither"),
        pytest.param(
            msgpack.packb(msgpack.ExtType(2, msgpack.packb([0, 3]))), 3, id="short bytes in the section"
        ),
    ],
)
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(array: bytes, section_bytes: int) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(array, b"\x07" * section_bytes)


def test_tensors_share_the_memory_of_the_section() -> None:
    array, *section = encode(np.arange(1000))
    memory = bytearray(b"".join(section))
    got = decode(array, memory)
    memory[0] = 77
    assert got[0] == 77
    assert not got.flags.writeable


def test_large_buffers_are_sent_from_where_they_are() -> None:
    numbers, text = np.arange(10_000), bytes(INLINE_BYTES)
    parts = encode([numbers, text])
    assert any(isinstance(part, memoryview) and np.shares_memory(np.asarray(part), numbers) for part in parts)
    assert any(isinstance(part, memoryview) and part.obj is text for part in parts)


def test_other_layouts_are_brought_into_row_major_order() -> None:
    square = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert (through(square.T) == square.T).all()
    assert (through(square[:, ::2]) == square[:, ::2]).all()


class Colour(IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


def test_near_relatives_of_plain_values_travel_as_those() -> None:
    sent = {
        "point": Point(1, 2),
        "colour": Colour.RED,
        "half": np.float64(0.5),
        "seven": np.int32(7),
        "yes": np.True_,
    }
    assert through(sent) == {"point": [1, 2], "colour": 1, "half": 0.5, "seven": 7, "yes": True}
    assert through((1, (2, bytearray(b"x"), memoryview(b"yz")))) == [1, [2, b"x", b"yz"]]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (2**64, "0x10000000000000000"),
        ([{"a": -(2**63) - 1}], "-0x8000000000000001"),
        ({1: 2}, "int"),
        ({b"a": 2}, "bytes"),
        ({3, 4}, "set"),
        ([object], "type"),
        (1j, "complex"),
        (np.array([object()]), "object"),
        (np.array([1j]), "complex128"),
        (np.array(["text"]), "<U4"),
        (np.datetime64("2026-01-01"), "datetime64"),
        (np.zeros((1,) * 9), "9 dimensions"),
        ("\ud800", "surrogates"),
        ([[0] * 2**19] * 3, "values"),
        (Tensor("f32", (3,), memoryview(b"1234")), "[3]"),
        (Tensor("f31", (1,), memoryview(b"1234")), "f31"),
    ],
)
def test_what_does_not_travel_is_refused_by_name(value: object, named: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        encode(value)
    assert named in str(caught.value)


def test_deep_and_large_values_are_refused_by_their_sender() -> None:
    deep: list[Any] = []
    for _ in range(MAX_NESTING):
        deep = [deep]
    with pytest.raises(LocalProtocolError, match="nested"):
        encode(deep)
    with pytest.raises(LocalProtocolError, match="over the limit of 100"):
        encode("x" * 100, max_bytes=100)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(LocalProtocolError, match="nested"):
        encode(loop)
