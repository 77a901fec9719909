"""One direction of a connection in memory: a queue of frames, a rate, a latency, losses and stalls.

Nothing here runs in a task of its own: whoever looks works out what has left and arrived by then.
"""

from __future__ import annotations

import math
from collections import deque
from random import Random
from typing import Final, Protocol

import trio

from lattica.protocols import KIB, MIB

# The scheduler's figures of a real connection (lattica.net.mux), so that what waits here waits there.
_FRAME_BYTES: Final = 64 * KIB  # of a stream that sends alone
_SHARED_FRAME_BYTES: Final = 16 * KIB  # while others wait
_MAX_QUEUED_BYTES: Final = 256 * KIB  # per stream
_CROWDED_BYTES: Final = 1 * MIB  # queued on the connection: beyond it each stream may queue one shared frame
_MIN_RETRANSMIT_SECONDS: Final = 0.2  # Linux' lower bound of the retransmission timeout


class Source(Protocol):
    """What waits to be sent over a link: one stream's bytes."""

    @property
    def queued(self) -> int:
        """How many bytes wait."""

    def take(self, max_bytes: int) -> tuple[bytes, bool]:
        """The next frame, b"" for the end of the stream; and whether more waits."""

    def left(self, frame: bytes, arrives: float) -> None:
        """A frame is on its way; `arrives` is a stamp."""


class Link:
    """When what is sent arrives, and in which turn.

    Streams take turns, a frame each, at `bandwidth` bytes a second. Times are kept as they were stamped; `due`
    adds what a partition has held back since then.
    """

    def __init__(self, latency: float, loss: float, bandwidth: float, random: Random) -> None:
        self.loss = loss  # probability that a chunk has to be sent again
        self._latency = latency
        self._bandwidth = bandwidth
        self._random = random
        self._waiting: deque[Source] = deque()
        self._latest: Source | None = None  # whose frame is being sent, when it has more
        self._free_at = 0.0  # when the frame that is being sent has left
        self._last = 0.0
        self._stalls: list[tuple[float, float]] = []
        self._stalled_since: float | None = None

    @property
    def latency(self) -> float:
        """Seconds, one way."""
        return self._latency

    def set(self, *, latency: float | None = None, bandwidth: float | None = None) -> None:
        """Change the line; what is on its way, or is being sent, keeps its time."""
        self.advance()
        self._latency = self._latency if latency is None else latency
        self._bandwidth = self._bandwidth if bandwidth is None else bandwidth

    def room(self, source: Source) -> int:
        """How many bytes more a stream may queue; 0 for now, until `next_at`."""
        queued = sum(other.queued for other in self._waiting)
        most = _SHARED_FRAME_BYTES if queued > _CROWDED_BYTES else _MAX_QUEUED_BYTES
        return max(0, most - source.queued)

    def add(self, source: Source) -> None:
        """A stream has something to send."""
        if source not in self._waiting:
            if not self._waiting:
                self._free_at = max(self._free_at, trio.current_time())
            self._waiting.append(source)
        self.advance()

    def remove(self, source: Source) -> None:
        """A stream has nothing to send after all."""
        if source in self._waiting:
            self._waiting.remove(source)

    def advance(self) -> None:
        """Send what has had its turn by now."""
        now = trio.current_time()
        while self._waiting and self._free_at <= now and self._stalled_since is None:
            if self._waiting[0] is self._latest:  # its turn was now: behind all that came while it lasted
                self._waiting.rotate(-1)
            source = self._latest = self._waiting[0]
            frame, is_more = source.take(_SHARED_FRAME_BYTES if len(self._waiting) > 1 else _FRAME_BYTES)
            if not is_more:
                self._waiting.popleft()
                self._latest = None
            self._free_at += len(frame) / self._bandwidth
            source.left(frame, self._stamp(self._free_at))

    def next_at(self) -> float:
        """When the next frame begins to be sent; infinity when none waits, and in a partition."""
        return self._free_at if self._waiting and self._stalled_since is None else math.inf

    def stamp(self) -> float:
        """The time at which a few bytes of control arrive: they go before the queue, behind what was sent."""
        self.advance()
        return self._stamp(max(trio.current_time(), self._free_at))

    def due(self, stamp: float) -> float:
        """When something with this stamp can be read; infinity while a partition holds it."""
        for since, until in self._stalls:
            if since < stamp <= until + self._latency:
                stamp = until + self._latency
        return stamp if self._stalled_since is None or stamp <= self._stalled_since else math.inf

    def stall(self) -> None:
        self.advance()
        if self._stalled_since is None:
            self._stalled_since = trio.current_time()

    def resume(self) -> None:
        if self._stalled_since is not None:
            self._stalls.append((self._stalled_since, trio.current_time()))
            self._stalled_since = None
            self._free_at = max(self._free_at, trio.current_time())

    def _stamp(self, left: float) -> float:
        again = max(_MIN_RETRANSMIT_SECONDS, 2 * self._latency)
        lost = self.loss and self._random.random() < self.loss
        self._last = max(self._last, left + self._latency + (again if lost else 0.0))
        return self._last
