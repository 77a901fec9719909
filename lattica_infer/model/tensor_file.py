"""The safetensors format: headers read within bounds, and one canonical spelling of a set of tensors.

A file is an 8-byte little-endian length, that many bytes of JSON (`{name: {dtype, shape, data_offsets}}`)
and the tensors' bytes without a hole. The `safetensors` library reads tensors for us; it does not tell where
in the file they lie, and that is needed to hash and move one layer's bytes without torch. Hence this reader,
which is tested against the library.

Canonical: tensors ordered by element size (largest first, so that each one is aligned to its elements), then
by name; JSON without spaces, keys in that order, padded with spaces to 8 bytes; no metadata. Two files that
hold the same tensors have the same canonical bytes, however they were split or ordered.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lattica_infer.errors import WeightsError

DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}  # what our models run with; quantised kinds are refused

MAX_HEADER_BYTES: Final = 64 * 1024 * 1024  # 100,000 tensors need 15 MB; the format itself allows 100 MB
MAX_DIMENSIONS: Final = 4
MAX_NAME_LENGTH: Final = 256
MAX_TENSOR_BYTES: Final = 1 << 40  # 1 TiB: keeps sums far from 64 bits


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its bytes. `dtype` is safetensors' word: a key of DTYPE_BYTES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= MAX_NAME_LENGTH and self.name.isprintable()):
            raise WeightsError(
                f"a tensor's name has 1 to {MAX_NAME_LENGTH} printable characters: {self.name[:80]!r}"
            )
        if self.dtype not in DTYPE_BYTES:
            raise WeightsError(
                f"tensor {self.name} has dtype {self.dtype[:20]!r}; import a model in F32, F16 or BF16"
            )
        if len(self.shape) > MAX_DIMENSIONS or any(size <= 0 for size in self.shape):
            raise WeightsError(f"tensor {self.name} has the impossible shape {list(self.shape)[:8]}")
        if self.size_bytes > MAX_TENSOR_BYTES:
            raise WeightsError(f"tensor {self.name} has {self.size_bytes} bytes, more than any model's")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where it lies: `start` is the offset of its first byte from the beginning of `file`."""

    spec: TensorSpec
    file: Path
    start: int


def canonical_order(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The order in which canonical bytes hold their tensors."""
    return tuple(sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name)))


def canonical_header(specs: Iterable[TensorSpec]) -> bytes:
    """The length, JSON and padding that stand before the tensors' bytes in a canonical file."""
    table: dict[str, Any] = {}
    offset = 0
    for spec in canonical_order(specs):
        end = offset + spec.size_bytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_tensor_table(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, by its header; no tensor's bytes are read.

    Raises:
        WeightsError: the file is truncated or its header breaks the format's rules.
    """
    try:
        with file.open("rb") as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise WeightsError(
                    f"{file} is truncated or no safetensors file: "
                    f"its header claims {length} of {file_bytes} bytes; copy it again"
                )
            header = stream.read(length)
    except FileNotFoundError as error:
        raise WeightsError(f"{file} does not exist, but the model's index names it; copy it too") from error
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror}") from error
    tensors = _parse_header(header, file)
    _check_layout(tensors, data_start=8 + length, file_bytes=file_bytes, file=file)
    return tensors


def _parse_header(header: bytes, file: Path) -> list[StoredTensor]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise WeightsError(f"{file} names something twice in its header; copy it again")
        return names

    try:
        table = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} has a header that is not JSON; copy the file again") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{file} has a header that is not a JSON object; copy the file again")
    table.pop("__metadata__", None)
    base = 8 + len(header)
    return [_parse_entry(name, entry, base, file) for name, entry in table.items()]


def _parse_entry(name: str, entry: Any, base: int, file: Path) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise WeightsError(f"{file} describes tensor {name[:80]!r} in no way that safetensors knows")
    numbers = [*shape, begin, end]
    if any(type(number) is not int or not 0 <= number <= MAX_TENSOR_BYTES << 8 for number in numbers):
        raise WeightsError(f"{file} describes tensor {name[:80]!r} with numbers out of range")
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != spec.size_bytes:
        raise WeightsError(
            f"tensor {name} in {file} spans {end - begin} bytes, but its shape needs {spec.size_bytes}"
        )
    return StoredTensor(spec, file, base + begin)


def _check_layout(tensors: list[StoredTensor], *, data_start: int, file_bytes: int, file: Path) -> None:
    """Tensors must fill the file from the header to the end: no hole, no overlap, nothing behind."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != position:
            raise WeightsError(f"tensor {tensor.spec.name} in {file} overlaps another or leaves a hole")
        position += tensor.spec.size_bytes
    if position != file_bytes:
        raise WeightsError(
            f"{file} has {file_bytes} bytes, but its tensors end at {position}; it is truncated or damaged: "
            "copy it again"
        )


def read_tensor_tables(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of all files of a model, by name. Raises WeightsError, also if two files hold one name."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_tensor_table(file):
            twin = tensors.setdefault(tensor.spec.name, tensor)
            if twin is not tensor:
                raise WeightsError(
                    f"tensor {tensor.spec.name} stands in both {twin.file} and {file}; keep one of them"
                )
    return tensors
