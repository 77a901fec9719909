"""Random values to begin from, and the ways in which a run cuts its input."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import numpy as np

from lattica.rpc.tensors import Tensor

_TEXTS: Final = ("", "a", "method", "naïve", "日本語", "\U0001f600", "line\nfeed", "\x00", "key" * 11)
_INTEGERS: Final = (0, 1, -1, 127, 128, -32, -33, 255, 256, 65_535, 65_536, 2**31, 2**32, 2**63 - 1, -(2**63))
_FLOATS: Final = (0.0, -0.0, 1.5, 1e300, float("inf"), float("nan"), 5e-324)
_DTYPES: Final = ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")


def cuts(data: bytes) -> Iterator[bytes]:
    """`data` in pieces as a socket might give them; which ones follows from the bytes themselves.

    One input in four comes whole and one in four byte by byte where it is short, the others in pieces of any size.
    """
    state = zlib.crc32(data)
    kind = state & 3
    if kind == 0 or not data:
        yield data
        return
    at = 0
    while at < len(data):
        state = state * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        size = 1 + (0 if kind == 1 and at < 64 else (state >> 8) % (1 << (state >> 20) % 14))
        yield data[at : at + size]
        at += size


def text(random: Random, longest: int = 40) -> str:
    """Short text, now and then of letters that take several bytes."""
    if random.random() < 0.6:
        return random.choice(_TEXTS)[:longest]
    return "".join(chr(random.choice((97, 65, 0x7F, 0xE9, 0x2028))) for _ in range(random.randrange(longest)))


def value(random: Random, depth: int = 0) -> Any:
    """A value that travels, containers and tensors among them."""
    kind = random.randrange(12 if depth < 4 else 8)
    match kind:
        case 0:
            return random.choice((None, True, False))
        case 1 | 2:
            return random.choice(_INTEGERS) if random.random() < 0.5 else random.getrandbits(63)
        case 3:
            return random.choice(_FLOATS)
        case 4 | 5:
            return text(random)
        case 6:
            return random.randbytes(random.choice((0, 1, 31, 300)))
        case 7:
            return tensor(random)
        case 8 | 9:
            return [value(random, depth + 1) for _ in range(random.choice((0, 1, 3, 17)))]
        case _:
            return {text(random): value(random, depth + 1) for _ in range(random.choice((0, 1, 3)))}


def tensor(random: Random) -> Any:
    """A small array of any dtype and up to three dimensions, or bytes so long that they leave the array."""
    kind = random.random()
    if kind < 0.1:
        return random.randbytes(4096 + random.randrange(100))
    shape = tuple(random.choice((0, 1, 2, 5)) for _ in range(random.randrange(4)))
    if kind < 0.2:
        count = int(np.prod(shape, dtype=int))
        return Tensor("bf16", shape, memoryview(random.randbytes(2 * count)))
    dtype = np.dtype(random.choice(_DTYPES))
    raw = random.randbytes(int(np.prod(shape, dtype=int)) * dtype.itemsize)
    if dtype == np.dtype("?"):
        raw = bytes(byte & 1 for byte in raw)
    return np.frombuffer(raw, dtype).reshape(shape)
