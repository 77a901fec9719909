"""Values to bytes and back: one msgpack array, and behind it a section of raw buffers.

None, bool, int (64 bits), float, str, bytes, list and dict with str keys keep their type; tuples become
lists; tensors (see `tensors`) travel. In the array a tensor is ExtType(1, [dtype, shape, offset, nbytes]),
and bytes of INLINE_BYTES or more are ExtType(2, [offset, nbytes]); offsets count from the section's start.
Buffers stand in the section in the order in which the array names them, each at the next multiple of 64, the
gaps zero, nothing behind the last: so nothing hides there and nothing overlaps.

Bytes from a peer raise RemoteProtocolError and nothing else, before more memory is taken than a small
multiple of their number. No I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica.protocols import INLINE_BYTES, MAX_FRAME_BYTES, MAX_FRAME_VALUES, MAX_NESTING, MAX_TENSOR_DIMS
from lattica.rpc.tensors import ALIGNMENT, DTYPES, Tensor, aligned_buffer, arrived, as_tensor, to_torch

__all__ = ["Tensor", "decode", "encode", "to_torch"]

Part = bytes | memoryview
_TENSOR: Final = 1
_BYTES: Final = 2
_MAX_EXT_BYTES: Final = 128  # dtype, MAX_TENSOR_DIMS sizes and two offsets need 98
_UNSCANNED_BYTES: Final = 4096  # up to here the worst that nested claims can make msgpack reserve is 32 MiB
_FEW: Final = 64  # values, up to which a list is looked at one by one
_LONG: Final = _UNSCANNED_BYTES + 1  # no bytes of a frame that is not scanned are longer
_FLAT: Final = frozenset({type(None), bool, int, float, str})
_LEAVES: Final = _FLAT | {bytes}
_STR: Final = frozenset({str})
_LISTS: Final = (list, tuple)  # tuples: a union of types is built anew each time it is written
_BUFFERS: Final = (bytes, bytearray, memoryview)
_ZEROS: Final = bytes(ALIGNMENT)


def encode(value: object, *, max_bytes: int = MAX_FRAME_BYTES) -> list[Part]:
    """The parts that make up a value on the wire: the msgpack array, then the section's buffers and gaps.

    Buffers are views of the caller's memory: it must not change before they are sent.

    Raises:
        LocalProtocolError: the value holds something that does not travel; the message names it.
    """
    if type(value) is list and _is_simple(value):
        try:
            packed = msgpack.packb(value)
        except (ValueError, TypeError, OverflowError):
            packed = b""
        if 0 < len(packed) <= max_bytes:
            return [packed]
    writer = _Writer()
    plain = writer.prepare(value, 0)
    try:
        packed = msgpack.packb(plain)
    except OverflowError as error:
        raise LocalProtocolError(
            f"an int of more than 64 bits does not travel: {_wide_int(plain)}"
        ) from error
    except (ValueError, TypeError) as error:  # a str with lone surrogates, say
        raise LocalProtocolError(f"a value does not travel: {error}") from error
    if len(packed) + writer.size_bytes > max_bytes:
        raise LocalProtocolError(
            f"a value of {len(packed) + writer.size_bytes} bytes is over the limit of {max_bytes};"
            " larger values belong in a blob or a stream"
        )
    return [packed, *writer.parts]


def decode(array: Part, section: Part = b"") -> Any:
    """The value that `encode` wrote. Tensors share the section's memory, where it may be written to.

    Raises:
        RemoteProtocolError: the bytes are not what `encode` writes, or are over a limit.
    """
    if len(array) > _UNSCANNED_BYTES:
        _scan(array)
    elif not len(section):
        try:
            value = msgpack.unpackb(array)
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            value = None
        if type(value) is list and _is_simple(value, _LONG):
            return value
    reader = _Reader(memoryview(section))
    size = len(array)
    try:
        value = msgpack.unpackb(
            array,
            ext_hook=reader.ext,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=min(size, MAX_FRAME_VALUES),
            max_map_len=min(size // 2, MAX_FRAME_VALUES),
            max_ext_len=_MAX_EXT_BYTES,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"not msgpack: {type(error).__name__}: {str(error)[:100]}") from error
    if reader.cursor != len(section):
        raise RemoteProtocolError(f"{len(section) - reader.cursor} bytes that no value names")
    _check(value, 0)
    return value


def _is_simple(values: list[Any], inline_bytes: int = INLINE_BYTES) -> bool:
    """Whether a list is what most messages are: flat values, short bytes, and short lists of these."""
    for value in values:
        kind = type(value)
        if kind in _FLAT or (kind is bytes and len(value) < inline_bytes):
            continue
        if kind is not list or len(value) > _FEW:
            return False
        for inner in value:
            kind = type(inner)
            if kind not in _FLAT and (kind is not bytes or len(inner) >= inline_bytes):
                return False
    return True


class _Writer:
    """Walks a value once: checks it, counts it, moves buffers out of it."""

    __slots__ = ("_values", "parts", "size_bytes")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.size_bytes = 0
        self._values = 1

    def prepare(self, value: Any, depth: int) -> Any:
        """The value as msgpack may have it; the same object where nothing had to change."""
        kind = type(value)
        if kind in _FLAT:
            return value
        if isinstance(value, _LISTS):
            self._enter(len(value), depth)
            # One pass in C decides for the usual flat list; only others are walked in Python.
            return (
                value if _FLAT.issuperset(map(type, value)) else [self.prepare(v, depth + 1) for v in value]
            )
        if isinstance(value, dict):
            self._enter(2 * len(value), depth)
            for key in value:
                if not isinstance(key, str):
                    raise LocalProtocolError(
                        f"keys of a dict must be str, not {type(key).__name__}: {key!r:.80}"
                    )
            if _FLAT.issuperset(map(type, value.values())):
                return value
            return {key: self.prepare(v, depth + 1) for key, v in value.items()}
        if isinstance(value, _BUFFERS):
            return self._bytes(value)
        tensor = as_tensor(value)
        if tensor is not None:
            return self._tensor(tensor)
        if isinstance(value, bool | int | float | str):
            return value  # an IntEnum, a numpy float64
        if hasattr(value, "dtype") and hasattr(value, "item"):  # a numpy scalar
            return self.prepare(value.item(), depth) if type(value.item()) in _LEAVES else self._refuse(value)
        return self._refuse(value)

    def _refuse(self, value: object) -> Any:
        raise LocalProtocolError(
            f"a {type(value).__module__}.{type(value).__qualname__} does not travel: {value!r:.80};"
            " send None, bool, int, float, str, bytes, list, dict or a tensor"
        )

    def _enter(self, values: int, depth: int) -> None:
        self._values += values
        if depth >= MAX_NESTING:
            raise LocalProtocolError(f"containers nested deeper than {MAX_NESTING} do not travel")
        if self._values > MAX_FRAME_VALUES:
            raise LocalProtocolError(
                f"more than {MAX_FRAME_VALUES} values at once do not travel; use an array"
            )

    def _bytes(self, value: bytes | bytearray | memoryview) -> Any:
        view = memoryview(value)
        if view.nbytes < INLINE_BYTES:
            return value if type(value) is bytes else bytes(view)
        if not view.c_contiguous:
            view = memoryview(bytes(view))
        return msgpack.ExtType(_BYTES, msgpack.packb([self._place(view.cast("B")), view.nbytes]))

    def _tensor(self, tensor: Tensor) -> Any:
        if len(tensor.shape) > MAX_TENSOR_DIMS:
            raise LocalProtocolError(f"a tensor of {len(tensor.shape)} dimensions does not travel")
        offset = self._place(tensor.data)
        head = [tensor.dtype, tensor.shape, offset, tensor.data.nbytes]
        return msgpack.ExtType(_TENSOR, msgpack.packb(head))

    def _place(self, data: memoryview) -> int:
        if gap := -self.size_bytes % ALIGNMENT:
            self.parts.append(_ZEROS[:gap])
        offset = self.size_bytes + gap
        self.parts.append(data)
        self.size_bytes = offset + data.nbytes
        return offset


class _Reader:
    """Turns ExtTypes into views of the section, in order."""

    __slots__ = ("_section", "cursor")

    def __init__(self, section: memoryview) -> None:
        self.cursor = 0
        self._section = section

    def ext(self, code: int, data: bytes) -> Any:
        fields = msgpack.unpackb(data, max_ext_len=0)
        match code, fields:
            case 1, [str(dtype), list(shape), int(offset), int(size)]:
                return self._tensor(dtype, shape, offset, size)
            case 2, [int(offset), int(size)] if size >= INLINE_BYTES:
                return bytes(self._take(offset, size))
        raise RemoteProtocolError(f"no value has extension type {code} with {len(data)} bytes like these")

    def _tensor(self, dtype: str, shape: list[Any], offset: int, size: int) -> Any:
        width = DTYPES.get(dtype, (0, None))[0]
        if not width or len(shape) > MAX_TENSOR_DIMS:
            raise RemoteProtocolError(
                f"no tensor of dtype {dtype[:16]!r} and {len(shape)} dimensions is known"
            )
        if (
            any(type(n) is not int or n < 0 or n >= 1 << 48 for n in shape)
            or math.prod(shape) * width != size
        ):
            raise RemoteProtocolError(
                f"a {dtype} tensor of {size} bytes cannot have shape {str(shape)[:100]}"
            )
        data = self._take(offset, size)
        if self._section.readonly and size:  # not a frame's own buffer: it came with others in one piece
            own = aligned_buffer(size)
            own[:] = data
            data = own
        tensor = Tensor(dtype, tuple(shape), data)
        if dtype == "bool" and size and tensor.numpy().view("uint8").max() > 1:
            raise RemoteProtocolError("a bool tensor holds a byte that is neither 0 nor 1")
        return arrived(tensor)

    def _take(self, offset: int, size: int) -> memoryview:
        start = self.cursor + -self.cursor % ALIGNMENT
        if offset != start or size < 0 or start + size > len(self._section):
            raise RemoteProtocolError(
                f"a buffer at {offset} of {size} bytes is not the next in a section of {len(self._section)}"
            )
        if any(self._section[self.cursor : start]):
            raise RemoteProtocolError("the gap before a buffer is not zero")
        self.cursor = start + size
        return self._section[start : self.cursor]


def _check(value: Any, depth: int) -> None:
    """What msgpack lets through and we do not: deep nesting, keys that are bytes, timestamps."""
    if isinstance(value, list):
        inner: Iterable[Any] = value
    elif isinstance(value, dict):
        if not _STR.issuperset(map(type, value)):
            raise RemoteProtocolError("a map has a key that is not text")
        inner = value.values()
    else:
        if isinstance(value, msgpack.Timestamp):
            raise RemoteProtocolError("timestamps do not travel")
        return
    if depth >= MAX_NESTING:
        raise RemoteProtocolError(f"containers nested deeper than {MAX_NESTING}")
    if not _LEAVES.issuperset(map(type, inner)):
        for item in inner:
            if type(item) not in _LEAVES:
                _check(item, depth + 1)


def _sizes() -> tuple[list[int], list[int]]:
    """For each first byte of a msgpack value: its size where that is fixed, else its length field's width."""
    fixed, width = [0] * 256, [0] * 256
    for byte in (*range(0x80), 0xC0, 0xC2, 0xC3, *range(0xE0, 0x100)):
        fixed[byte] = 1
    for byte in range(0xA0, 0xC0):
        fixed[byte] = 1 + (byte & 31)
    for byte, size in zip(range(0xCA, 0xD9), (5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18), strict=True):
        fixed[byte] = size
    for byte, size in zip(range(0xC4, 0xCA), (1, 2, 4, 1, 2, 4), strict=True):
        width[byte] = size
    for byte, size in zip(range(0xD9, 0xE0), (1, 2, 4, 2, 4, 2, 4), strict=True):
        width[byte] = size
    return fixed, width


_FIXED, _WIDTH = _sizes()


def _scan(data: Part) -> None:
    """Count values and nesting without building anything.

    msgpack reserves a list for as many items as its head claims, at every level of nesting: a few kilobytes
    of heads could reserve gigabytes. Here a claim is held against the bytes that are left and against one
    limit for the whole frame before msgpack sees it.
    """
    at, size, values = 0, len(data), 1
    waiting: list[int] = []
    left = 1  # values still to come at this level; the same of the levels around it
    try:
        while True:
            while not left:
                if not waiting:
                    if at != size:
                        raise RemoteProtocolError(f"not msgpack: {size - at} bytes too many")
                    return
                left = waiting.pop()
            left -= 1
            head = data[at]
            step = _FIXED[head]
            if step:
                at += step
                continue
            count, step = _claim(data, at, head)
            at += step
            if at > size or count > size - at:
                raise RemoteProtocolError("not msgpack: a length is larger than what follows")
            values += count
            if values > MAX_FRAME_VALUES or len(waiting) >= MAX_NESTING:
                raise RemoteProtocolError(
                    f"over the limit of {MAX_FRAME_VALUES} values or {MAX_NESTING} nested containers"
                )
            if count:
                waiting.append(left)
                left = count
    except IndexError:
        raise RemoteProtocolError("not msgpack: it ends too early") from None


def _claim(data: Part, at: int, head: int) -> tuple[int, int]:
    """How many values follow as children of the value at `at`, and how many bytes it has itself."""
    if 0x80 <= head < 0xA0:
        return (head & 15) * (2 if head < 0x90 else 1), 1
    width = _WIDTH[head]
    if not width:  # 0xc1
        raise RemoteProtocolError("not msgpack: a byte that begins no value")
    length = int.from_bytes(data[at + 1 : at + 1 + width], "big")
    if head < 0xDC:  # bin, ext (one byte of type more), str
        return 0, 1 + width + length + (0xC7 <= head < 0xCA)
    return length * (2 if head >= 0xDE else 1), 1 + width


def _wide_int(value: Any) -> str:
    """The int that msgpack could not take, for the message; at most 80 characters of it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        text = hex(value)
        return text if len(text) < 80 else text[:77] + "..."
    return next(filter(None, map(_wide_int, inner)), "")
