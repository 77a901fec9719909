"""Frames: `varint array length, varint section length, array, section`. Bytes in, bodies out, nothing else.

Both lengths stand in front, so that an oversize frame is refused before memory is taken, and the section
goes straight into a buffer of its own whose start is aligned (see `codec` for what is in them). No I/O.
"""

from __future__ import annotations

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

    A frame's bytes are copied once, into the frame. One whole frame is held ready; what came behind it stays
    as it came, so that a thousand tiny frames take no more room than their bytes. Memory grows with the
    bytes that have arrived, never with a length that was only announced.
    """

    __slots__ = (
        "_announced",
        "_array",
        "_array_left",
        "_at",
        "_data",
        "_error",
        "_max_bytes",
        "_ready",
        "_section",
        "_section_at",
    )

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._data = b""  # what came last, read up to _at
        self._at = 0
        self._ready: Body | None = None
        self._error: RemoteProtocolError | None = None
        self._announced = 0
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
    def unread(self) -> int:
        """Bytes that are here and belong to a whole frame nobody has taken, or stand behind it; 0 without one."""
        if self._ready is None:
            return 0
        return len(self._ready[0]) + len(self._ready[1]) + len(self._data) - self._at

    @property
    def is_failed(self) -> bool:
        """Whether what came is not a frame, so that nothing behind it can be read."""
        return self._error is not None

    @property
    def is_between_frames(self) -> bool:
        """Whether everything that was fed has been taken as whole frames, so that the stream may end here."""
        return not (self._ready or self._error or self.missing) and self._at == len(self._data)

    def head(self) -> Body | None:
        """The frame that `next` would give, left where it is."""
        return self._ready

    def next(self) -> Body | None:
        """The next whole frame, None while there is none.

        Raises:
            RemoteProtocolError: the bytes behind the frames given out so far are not a frame. Final.
        """
        body = self._ready
        if body is not None:
            self._ready = None
            self._advance()
        elif self._error is not None:
            raise self._error
        return body

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the stream. Never raises: a frame that is wrong shows in `next`."""
        if self._error is not None:
            return
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0
        self._advance()

    def _advance(self) -> None:
        """Read on until a frame is ready, or the bytes are used up."""
        while self._ready is None and self._error is None and self._at < len(self._data):
            if self.missing:
                self._body()
            elif not self._lengths():
                return

    def _lengths(self) -> bool:
        """Read the two lengths that open a frame; False, with nothing read, while they are not all here."""
        at, lengths = self._at, []
        for _ in range(2):
            number = shift = 0
            while True:
                if at == len(self._data):
                    return False
                byte = self._data[at]
                at += 1
                number |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
                if shift == 7 * _MAX_VARINT_BYTES:
                    return self._fail("a frame's length has more than 5 bytes")
            if shift > 7 and not byte:
                return self._fail("a frame's length is not written the short way")
            lengths.append(number)
        array, section = lengths
        if not array or array + section > self._max_bytes:
            return self._fail(
                f"a frame of {array} + {section} bytes is empty or over the limit of {self._max_bytes}"
            )
        self._at = at
        self._array_left, self._announced = array, array + section
        if section:
            self._section = aligned_buffer(section)
        return True

    def _body(self) -> None:
        """Move bytes into the frame under way."""
        if self._array_left:
            piece = self._data[self._at : self._at + self._array_left]
            self._array.append(piece)
            self._array_left -= len(piece)
            self._at += len(piece)
        if not self._array_left and self._section_at < len(self._section):
            rest = len(self._section) - self._section_at
            view = memoryview(self._data)[self._at : self._at + rest]
            self._section[self._section_at : self._section_at + len(view)] = view
            self._section_at += len(view)
            self._at += len(view)
        if not self.missing:
            array = self._array[0] if len(self._array) == 1 else b"".join(self._array)
            self._ready = (array, self._section)
            self._array, self._section, self._section_at = [], _EMPTY, 0

    def _fail(self, why: str) -> bool:
        self._error = RemoteProtocolError(why)
        return False
