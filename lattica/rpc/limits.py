"""How much calls may take, and the account that is kept of each peer. The defaults stand in `protocols`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

from lattica import protocols
from lattica.protocols import MAX_ERROR_BYTES

_FAILURE_BYTES: Final = 4 * MAX_ERROR_BYTES  # the frame of an error fits, however small the limit
_MIN_RETRY_SECONDS: Final = 0.05
_MAX_RETRY_SECONDS: Final = 5.0
_SHARE: Final = 0.1  # of the latest call in the mean of a peer's calls


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one Rpc.

    `max_argument_bytes` is of a call's arguments, and of an item that a caller sends; `max_reply_bytes` of a
    result, and of an item that a handler yields; each with the frame that it travels in. `max_calls_per_peer`
    counts those in flight, in each direction by itself. `max_received_bytes_per_peer` is what the arguments of
    one peer's running calls may take together, those of up to `protocols.SMALL_FRAME_BYTES` not counted: the
    number of calls bounds them.
    """

    max_argument_bytes: int = protocols.MAX_ARGUMENT_BYTES
    max_reply_bytes: int = protocols.MAX_REPLY_BYTES
    max_calls_per_peer: int = protocols.MAX_CALLS_PER_PEER
    max_streams_per_peer: int = protocols.MAX_STREAMS_PER_PEER
    max_received_bytes_per_peer: int = protocols.MAX_RECEIVED_BYTES_PER_PEER
    max_pooled_streams: int = protocols.MAX_POOLED_STREAMS

    @property
    def max_reply_frame_bytes(self) -> int:
        """What a caller accepts: a reply, or an error."""
        return max(self.max_reply_bytes, _FAILURE_BYTES)


class Budget:
    """Memory that may be in use at once. One piece is always let in, however large: it may use all of it."""

    __slots__ = ("_lot", "limit", "used")

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self.used = 0
        self._lot = trio.lowlevel.ParkingLot()

    def take(self, size_bytes: int) -> bool:
        """Take as much, or nothing and return False."""
        if self.used and self.used + size_bytes > self.limit:
            return False
        self.used += size_bytes
        return True

    async def wait_and_take(self, size_bytes: int) -> None:
        """Take as much, as soon as others have given enough back."""
        while not self.take(size_bytes):
            await self._lot.park()

    def give(self, size_bytes: int) -> None:
        """Give back what was taken."""
        self.used -= size_bytes
        if self._lot:
            self._lot.unpark_all()


class Load:
    """What one peer keeps busy here."""

    __slots__ = ("_mean_seconds", "arguments", "calls", "items", "streams")

    def __init__(self, limits: Limits) -> None:
        self.arguments = Budget(limits.max_received_bytes_per_peer)  # of running calls: refused beyond
        self.items = Budget(limits.max_received_bytes_per_peer)  # under way: wait beyond
        self.streams = 0
        self.calls = 0
        self._mean_seconds: float | None = None

    def ended(self, seconds: float) -> None:
        """A call has ended that took so long."""
        self.calls -= 1
        mean = self._mean_seconds
        self._mean_seconds = seconds if mean is None else mean + _SHARE * (seconds - mean)

    @property
    def retry_after(self) -> float:
        """Seconds after which a refused call may find a place: as long as this peer's calls have taken."""
        mean = 1.0 if self._mean_seconds is None else self._mean_seconds
        return min(max(mean, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
