"""How far a sender may run ahead of its reader: the receive window of one stream and the budget they share.

Pure arithmetic. A window starts at the protocol's size and doubles while its reader keeps up and, from 1 MiB on, the
writer uses it up within a few round trips: then the window, and not the link or the reader, is what holds it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
INITIAL_WINDOW: Final = 256 * KIB  # the protocol's own; both sides start with it
# Below this a window must last for a turn of a busy scheduler, not for a round trip.
EASY_WINDOW: Final = KIB * KIB
MAX_WINDOW: Final = 16 * KIB * KIB  # 160 MB/s over 100 ms
EXTRA_WINDOWS: Final = 64 * KIB * KIB  # growth of all windows of one connection together
GROW_WITHIN_ROUND_TRIPS: Final = 2  # so it ends at 2 to 4 times bandwidth x delay
MIN_ROUND_TRIP: Final = 0.0005  # seconds; both event loops take this long once there is work


class ReferenceBudget:
    """Growth of receive windows beyond their first size, for all connections that share this.

    Args:
        limit_bytes: what all of them together may grow by.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self.used = 0

    def take(self, size: int) -> int:
        """As much of `size` as is left."""
        taken = max(0, min(size, self.limit - self.used))
        self.used += taken
        return taken

    def give_back(self, size: int) -> None:
        """Return what a window had grown by."""
        self.used -= size


@dataclass(slots=True)
class ReceiveWindow:
    """What the other side may send on one stream. `epoch` is when growth was last considered, in seconds."""

    epoch: float
    size: int = INITIAL_WINDOW  # what `left` and the unread bytes add up to after a credit
    left: int = INITIAL_WINDOW  # what the other side may still send
    used: int = 0  # credited since `epoch`
    drained: bool = False  # since `epoch` the reader once had nothing to read

    def credit(self, unread: int) -> int:
        """What to grant after a read that left `unread` bytes: nothing until half the window was used."""
        self.drained |= unread == 0
        credit = self.size - self.left - unread
        if credit * 2 < self.size:
            return 0
        self.left += credit
        self.used += credit
        return credit

    def wants_growth(self, now: float, rtt: float | None) -> bool:
        """Whether to grow, asked whenever data arrives.

        `rtt` is the shortest round trip seen, in seconds; None before the first ping. A mean would count the queue
        that a large window builds up on the way, and let the window grow because it is large.

        Decided on arrival and not at the read: a read doesn't know how late it is, bytes that follow it do.
        """
        if not self.used:
            return False
        elapsed, used, drained = now - self.epoch, self.used, self.drained
        self.epoch, self.used, self.drained = now, 0, False
        if rtt is None or self.size < EASY_WINDOW:
            return drained
        allowed = GROW_WITHIN_ROUND_TRIPS * max(rtt, MIN_ROUND_TRIP)
        return drained and elapsed * self.size <= allowed * used

    def grow(self, size: int) -> None:
        self.size += size
        self.left += size
