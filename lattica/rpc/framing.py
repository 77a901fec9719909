"""Frames: `varint array length, varint section length, array, section`. Bytes in, bodies out, nothing else.

Both lengths stand in front, so that an oversize frame is refused before memory is taken, and so that a large
section can be received straight into a buffer of its own whose start is aligned (see `codec` for what is in
them). No I/O.
"""

from __future__ import annotations

from typing import Final

from lattica.errors import RemoteProtocolError
from lattica.protocols import KIB, MAX_FRAME_BYTES
from lattica.rpc.codec import Part
from lattica.rpc.tensors import aligned_buffer

Body = tuple[bytes, memoryview]  # array, section
SKIPPED: Final = memoryview(bytes(1))  # the section of a frame that was dropped, by identity
_EMPTY: Final = memoryview(b"")
_MAX_VARINT_BYTES: Final = 5
_JOIN_BYTES: Final = 16 * KIB  # smaller parts are copied together: a copy costs less than another send
_FIRST_BYTES: Final = 256 * KIB  # of a section get memory at once, the rest as bytes arrive
_GROWTH: Final = 4  # then it grows by this: a third of a large section is copied once more


def varint(number: int) -> bytes:
    """An unsigned LEB128, as in the multiformats' unsigned-varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_HEADS: Final = [varint(size) + b"\x00" for size in range(4096)]  # of frames without a section


def frame_of(array: bytes) -> bytes:
    """A frame without a section."""
    size = len(array)
    return (_HEADS[size] if size < 4096 else varint(size) + b"\x00") + array


def frame(parts: list[Part]) -> list[Part]:
    """A frame from what `codec.encode` gave; neighbours that are small are joined, large parts not copied."""
    array = parts[0]
    if len(parts) == 1 and len(array) < _JOIN_BYTES:
        return [frame_of(bytes(array))]
    section_bytes = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts[1:])
    out: list[Part] = []
    small: list[Part] = [varint(len(array)) + varint(section_bytes)]
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

    What has arrived stays as it came until somebody asks for the frame in it, so that a thousand tiny frames take
    no more room than their bytes. A section that is not here as a whole gets an aligned buffer, which `buffer`
    gives out to be received into. Memory grows with the bytes that have arrived, never with a length that was
    only announced.

    Args:
        max_bytes: of a frame, both its parts; one that announces more is refused.
        ask_from: a frame of more bytes than that waits, `asks` being set, until `admit` or `skip`.
    """

    __slots__ = (
        "_announced",
        "_array",
        "_array_left",
        "_ask_from",
        "_at",
        "_data",
        "_error",
        "_max_bytes",
        "_ready",
        "_section",
        "_section_at",
        "_section_bytes",
        "_skipping",
        "asks",
    )

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES, *, ask_from: int | None = None) -> None:
        self.asks = False  # a large frame is announced, and nobody has said yet whether it is wanted
        self._max_bytes = max_bytes
        self._ask_from = max_bytes if ask_from is None else ask_from
        self._data = b""  # what came last, read up to _at
        self._at = 0
        self._ready: Body | None = None  # taken out of the data by `head`
        self._error: RemoteProtocolError | None = None
        # The frame under way, when it is not here as a whole:
        self._announced = 0
        self._array: list[bytes] = []
        self._array_left = 0
        self._section = _EMPTY
        self._section_bytes = 0
        self._section_at = 0
        self._skipping = False

    @property
    def missing(self) -> int:
        """How many bytes of the frame under way are still to come; 0 between frames."""
        return self._array_left + self._section_bytes - self._section_at

    @property
    def announced(self) -> int:
        """The size of the frame under way, both its parts; 0 between frames."""
        return self._announced

    @property
    def unread(self) -> int:
        """Bytes that are here and not in a frame that was given out or is under way."""
        ready = 0 if self._ready is None else len(self._ready[0]) + len(self._ready[1])
        return ready + len(self._data) - self._at

    @property
    def is_failed(self) -> bool:
        """Whether what came is not a frame, so that nothing behind it can be read."""
        return self._error is not None

    @property
    def is_between_frames(self) -> bool:
        """Whether everything that was fed has been taken as whole frames, so that the stream may end here."""
        idle = not (self._ready or self._error or self._announced)
        return idle and self._at == len(self._data)

    def head(self) -> Body | None:
        """The frame that `next` would give, left where it is; None also where `next` would raise."""
        if self._ready is None and self._error is None:
            self._ready = self._cut()
        return self._ready

    def next(self) -> Body | None:
        """The next whole frame, None while there is none.

        Of a frame that was skipped: the first two bytes and the last one of its array, and SKIPPED.

        Raises:
            RemoteProtocolError: the bytes behind the frames given out so far are not a frame. Final.
        """
        body = self._ready
        if body is not None:
            self._ready = None
            return body
        if self._error is None:
            body = self._cut()
        if self._error is not None:
            raise self._error
        return body

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the stream. Never raises: a frame that is wrong shows in `next`."""
        if self._error is not None:
            return
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    def admit(self) -> None:
        """Answer `asks`: the frame may have memory."""
        self.asks = False

    def skip(self) -> None:
        """Answer `asks`: drop the frame's bytes as they come."""
        self.asks = False
        self._skipping = True

    def buffer(self) -> memoryview | None:
        """Where the next bytes may be received to, None where they must be fed. Asked after `next` gave None."""
        if self._array_left or self._section_at == self._section_bytes or self.asks or self._skipping:
            return None
        if self._section_at == len(self._section):
            self._grow()
        return self._section[self._section_at :]

    def received(self, size: int) -> None:
        """So many bytes were put into `buffer`."""
        self._section_at += size

    def _cut(self) -> Body | None:
        """Take a frame out of the data, or as much of one as is here."""
        if not self._announced:
            data, at, size = self._data, self._at, len(self._data)
            if at == size:
                return None
            array = data[at]
            if array < 0x80 and size - at > 1 and data[at + 1] < 0x80:  # lengths that most frames have
                section = data[at + 1]
                at += 2
            elif size - at > 2 and 0 < data[at + 1] < 0x80 and data[at + 2] < 0x80:
                array = array & 0x7F | data[at + 1] << 7
                section = data[at + 2]
                at += 3
            elif (lengths := self._lengths()) is not None:
                array, section, at = lengths
            else:
                return None
            total = array + section
            if not array or total > self._max_bytes:
                self._fail(
                    f"a frame of {array} + {section} bytes is empty or over the limit of {self._max_bytes}"
                )
                return None
            end = at + total
            if end <= size and total <= self._ask_from:  # the usual case: all of it is here
                self._at = end
                middle = at + array
                return data[at:middle], memoryview(data)[middle:end] if section else _EMPTY
            self._at = at
            self._announced, self._array_left, self._section_bytes = total, array, section
            self.asks = total > self._ask_from
        if self.asks:
            return None
        self._fill()
        return None if self.missing else self._finish()

    def _lengths(self) -> tuple[int, int, int] | None:
        """The two lengths that open a frame, and where they end; None while they are not all here."""
        at, lengths = self._at, []
        for _ in range(2):
            number = shift = 0
            while True:
                if at == len(self._data):
                    return None
                byte = self._data[at]
                at += 1
                number |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
                if shift == 7 * _MAX_VARINT_BYTES:
                    self._fail("a frame's length has more than 5 bytes")
                    return None
            if shift > 7 and not byte:
                self._fail("a frame's length is not written the short way")
                return None
            lengths.append(number)
        return lengths[0], lengths[1], at

    def _fill(self) -> None:
        """Move bytes into the frame under way."""
        rest = len(self._data) - self._at
        if self._array_left and rest:
            piece = self._data[self._at : self._at + self._array_left]
            self._at += len(piece)
            rest -= len(piece)
            self._array_left -= len(piece)
            self._array.append(piece)
            if self._skipping:  # keep what `next` tells of it
                joined = b"".join(self._array)
                self._array = [joined[:2], joined[2:][-1:]]
        left = self._section_bytes - self._section_at
        if self._array_left or not left or not rest:
            return
        rest = min(rest, left)
        if self._skipping:
            self._section_at += rest
        elif not self._section_at and rest == left:  # all here: no buffer of its own
            self._section = memoryview(self._data)[self._at : self._at + rest]
            self._section_at = rest
        else:
            while self._section_at + rest > len(self._section):
                self._grow()
            self._section[self._section_at : self._section_at + rest] = memoryview(self._data)[
                self._at : self._at + rest
            ]
            self._section_at += rest
        self._at += rest

    def _grow(self) -> None:
        old = self._section
        self._section = aligned_buffer(min(self._section_bytes, max(_FIRST_BYTES, _GROWTH * len(old))))
        self._section[: len(old)] = old

    def _finish(self) -> Body:
        array = self._array[0] if len(self._array) == 1 else b"".join(self._array)
        body = (array, SKIPPED if self._skipping else self._section)
        self._array, self._section = [], _EMPTY
        self._announced = self._section_bytes = self._section_at = 0
        self._skipping = False
        return body

    def _fail(self, why: str) -> None:
        self._error = RemoteProtocolError(why)


def size_of(body: Body) -> int:
    """A body's bytes, both parts."""
    return len(body[0]) + len(body[1])
