"""Frames: `varint array length, varint section length, array, section`. Bytes in, bodies out, nothing else.

Both lengths stand in front, so that an oversize frame is refused before memory is taken, and the section
goes straight into a buffer of its own whose start is aligned (see `codec` for what is in them). No I/O.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from lattica.errors import RemoteProtocolError
from lattica.protocols import KIB, MAX_FRAME_BYTES
from lattica.rpc.codec import Part
from lattica.rpc.tensors import aligned_buffer

Body = tuple[bytes, memoryview]  # array, section
_EMPTY: Final = memoryview(b"")
_MAX_VARINT_BYTES: Final = 5
_JOIN_BYTES: Final = 16 * KIB  # smaller parts are copied together: a copy costs less than another send


def varint(number: int) -> bytes:
    """An unsigned LEB128, as in the multiformats' unsigned-varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def frame(parts: list[Part]) -> list[Part]:
    """A frame from what `codec.encode` gave; neighbours that are small are joined, large parts not copied."""
    section_bytes = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts[1:])
    head = varint(len(parts[0])) + varint(section_bytes)
    if len(parts) == 1 and len(parts[0]) < _JOIN_BYTES:
        return [head + parts[0]]
    out: list[Part] = []
    small: list[Part] = [head]
    for part in parts:
        if len(part) < _JOIN_BYTES:
            small.append(part)
            continue
        if small:
            out.append(b"".join(small))
            small = []
        out.append(part)
    if small:
        out.append(b"".join(small))
    return out


class FrameReader:
    """Cuts a stream of bytes into frames.

    Each byte is copied once, into the frame that it belongs to. Memory grows with the bytes that have
    arrived, never with a length that was only announced.
    """

    __slots__ = (
        "_announced",
        "_array",
        "_array_left",
        "_error",
        "_head",
        "_max_bytes",
        "_ready",
        "_section",
        "_section_at",
        "buffered",
    )

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.buffered = 0  # bytes of whole frames that nobody has taken yet
        self._max_bytes = max_bytes
        self._ready: deque[Body] = deque()
        self._error: RemoteProtocolError | None = None
        self._announced = 0
        self._head = b""  # the two lengths, as far as they are here
        self._array: list[bytes] = []
        self._array_left = 0
        self._section = _EMPTY
        self._section_at = 0

    @property
    def missing(self) -> int:
        """How many bytes of the frame under way are still to come; 0 between frames."""
        return self._array_left + len(self._section) - self._section_at

    @property
    def announced(self) -> int:
        """The size of the frame under way, both its parts; 0 between frames."""
        return self._announced if self.missing else 0

    @property
    def is_failed(self) -> bool:
        """Whether what came is not a frame, so that nothing behind it can be read."""
        return self._error is not None

    @property
    def is_between_frames(self) -> bool:
        """Whether everything that was fed belongs to whole frames, so that the stream may end here."""
        return not (self._head or self.missing or self._error)

    def __len__(self) -> int:
        return len(self._ready)

    def head(self) -> Body | None:
        """The frame that `next` would give, left where it is."""
        return self._ready[0] if self._ready else None

    def next(self) -> Body | None:
        """The next whole frame, None while there is none.

        Raises:
            RemoteProtocolError: the bytes behind the frames given out so far are not a frame. Final.
        """
        if self._ready:
            array, section = self._ready.popleft()
            self.buffered -= len(array) + len(section)
            return array, section
        if self._error is not None:
            raise self._error
        return None

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the stream. Never raises: a frame that is wrong shows in `next`."""
        if self._error is not None:
            return
        at = 0
        if self._head:
            data, self._head = self._head + data, b""
        while at < len(data) and self._error is None:
            at = self._body(data, at) if self.missing else self._lengths(data, at)

    def _lengths(self, data: bytes, at: int) -> int:
        """Read the two lengths that open a frame; how far it came."""
        start, lengths = at, []
        for _ in range(2):
            number = shift = 0
            while True:
                if at == len(data):
                    self._head = data[start:]
                    return at
                byte = data[at]
                at += 1
                number |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
                if shift == 7 * _MAX_VARINT_BYTES:
                    self._error = RemoteProtocolError("a frame's length has more than 5 bytes")
                    return at
            if shift > 7 and not byte:
                self._error = RemoteProtocolError("a frame's length is not written the short way")
                return at
            lengths.append(number)
        array, section = lengths
        if not array or array + section > self._max_bytes:
            self._error = RemoteProtocolError(
                f"a frame of {array} + {section} bytes is empty or over the limit of {self._max_bytes}"
            )
            return at
        self._array_left, self._announced = array, array + section
        if section:
            self._section = aligned_buffer(section)
        return at

    def _body(self, data: bytes, at: int) -> int:
        """Move bytes into the frame under way; how far it came."""
        if self._array_left:
            piece = data[at : at + self._array_left]
            self._array.append(piece)
            self._array_left -= len(piece)
            at += len(piece)
        if not self._array_left and self._section_at < len(self._section):
            piece_view = memoryview(data)[at : at + len(self._section) - self._section_at]
            self._section[self._section_at : self._section_at + len(piece_view)] = piece_view
            self._section_at += len(piece_view)
            at += len(piece_view)
        if not self.missing:
            array = self._array[0] if len(self._array) == 1 else b"".join(self._array)
            self._ready.append((array, self._section))
            self.buffered += len(array) + len(self._section)
            self._array, self._section, self._section_at = [], _EMPTY, 0
        return at
