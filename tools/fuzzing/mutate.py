"""Changed inputs from valid ones: what a broken program, a bad line or an attacker makes of a message.

Deterministic: the same `Random` gives the same inputs. Knows what encoded messages are made of (lengths, varints,
repeated parts) and nothing of what they mean.
"""

from __future__ import annotations

from random import Random
from typing import Final

# Bytes that stand at an edge of some encoding: 0, signs, the continuation bit, msgpack's heads, ASCII's ends.
_EDGES: Final = (
    bytes([0, 1, 2, 4, 8, 15, 16, 31, 32, 34, 64, 91, 123, 127, 128, 129, 144, 160, 192, 193])
    + bytes(range(0xC4, 0xE1))
    + bytes([254, 255])
)
_WIDTHS: Final = (1, 2, 4, 8)
_ORDERS: Final = ("big", "little")
_MAX_CHANGES: Final = 4


class Mutator:
    """Changes byte strings. `words` are strings worth putting in, such as a protocol's names."""

    def __init__(self, random: Random, words: tuple[bytes, ...] = (), *, max_bytes: int = 1 << 14) -> None:
        self._draw = random.random
        self._bits = random.getrandbits
        self._words = words
        self._max_bytes = max_bytes
        self._changes = [
            self._flip, self._flip, self._edge, self._edge, self._number, self._number, self._varint,
            self._cut, self._truncate, self._repeat, self._copy, self._noise, self._graft, self._graft,
        ]  # fmt: skip
        if words:
            self._changes += [self._word, self._word]
        self._other = b""

    def mutate(self, data: bytes, other: bytes) -> bytes:
        """`data` after one to four changes, some of which take parts of `other`."""
        self._other = other
        changed = bytearray(data)
        changes = self._changes
        for _ in range(
            1 + int(self._draw() ** 2 * _MAX_CHANGES)
        ):  # mostly few: far from valid is refused early
            changes[int(self._draw() * len(changes))](changed)
        return bytes(changed[: self._max_bytes])

    def _at(self, data: bytearray) -> int:
        return int(self._draw() * len(data))

    def _span(self, data: bytes | bytearray) -> tuple[int, int]:
        """A piece of `data`, more often short than long."""
        start = int(self._draw() * len(data))
        return start, start + 1 + int(self._draw() ** 3 * (len(data) - start))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._at(data)] ^= 1 << self._bits(3)

    def _edge(self, data: bytearray) -> None:
        if data:
            data[self._at(data)] = _EDGES[int(self._draw() * len(_EDGES))]

    def _number(self, data: bytearray) -> None:
        """Change an integer: by a little, to an edge of its width, or to about the message's length."""
        width, order = _WIDTHS[self._bits(2)], _ORDERS[self._bits(1)]
        if len(data) < width:
            return
        at = int(self._draw() * (len(data) - width + 1))
        choice = self._bits(2)
        if choice == 0:
            value = int.from_bytes(data[at : at + width], order) + int(self._draw() * 33) - 16  # type: ignore[arg-type]
        elif choice == 1:
            value = (1 << self._bits(6)) - self._bits(1)
        elif choice == 2:
            value = len(data) + int(self._draw() * 33) - 16
        else:
            value = self._bits(8 * width)
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]

    def _varint(self, data: bytearray) -> None:
        """Put an unsigned LEB128 in the place of another, sometimes longer than it need be."""
        at = self._at(data)
        end = at
        while end < len(data) - 1 and data[end] & 0x80:
            end += 1
        value = self._bits(1 + int(self._draw() * 40))
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        if not self._bits(3):
            out[-1] |= 0x80
            out += b"\x80" * self._bits(3) + b"\x00"
        data[at : end + 1] = out

    def _cut(self, data: bytearray) -> None:
        if data:
            start, end = self._span(data)
            del data[start:end]

    def _truncate(self, data: bytearray) -> None:
        del data[self._at(data) :]

    def _repeat(self, data: bytearray) -> None:
        if data:
            start, end = self._span(data)
            data[end:end] = data[start:end] * (1 + int(self._draw() ** 4 * 64))

    def _copy(self, data: bytearray) -> None:
        """Write one piece over another place."""
        if data:
            start, end = self._span(data)
            at = self._at(data)
            data[at : at + end - start] = data[start:end]

    def _noise(self, data: bytearray) -> None:
        at, size = int(self._draw() * (len(data) + 1)), 1 + int(self._draw() ** 3 * 32)
        data[at : at + size * self._bits(1)] = self._bits(8 * size).to_bytes(size, "big")

    def _graft(self, data: bytearray) -> None:
        """A piece of the other message, put in or in place of ours."""
        if self._other:
            start, end = self._span(self._other)
            at = int(self._draw() * (len(data) + 1))
            data[at : at + (end - start) * self._bits(1)] = self._other[start:end]

    def _word(self, data: bytearray) -> None:
        word = self._words[int(self._draw() * len(self._words))]
        at = int(self._draw() * (len(data) + 1))
        data[at : at + len(word) * self._bits(1)] = word
