"""Ending what takes too long, at less than a cancel scope costs each call.

A call that ends in time, as nearly all do, costs an entry in a dict and its removal; only when the earliest time has
come does anybody look at all of them.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import trio

_GRAIN_SECONDS: Final = 0.001  # between two looks at the least, however many deadlines stand close together


class Expiring(Protocol):
    """Something that is ended when its time has come."""

    def expire(self) -> None:
        """Time is up. Must not wait and must not raise."""


class Deadlines:
    """Calls `expire` on what is still held when its time comes.

    One task of the run's own waits for the earliest of the times, while there is any.
    """

    def __init__(self) -> None:
        self._held: dict[Expiring, float] = {}
        self._wake_at = math.inf
        self._waiting: trio.CancelScope | None = None
        self._running = False
        self._closed = False
        self._lot = trio.lowlevel.ParkingLot()  # where nobody is ever woken

    def hold(self, entry: Expiring, at: float) -> None:
        """Expire an entry at a time of trio's clock, unless it is released before."""
        self._held[entry] = at
        if at < self._wake_at:
            self._wake_at = at
            if not self._running:
                self._running = True
                trio.lowlevel.spawn_system_task(self._run)
            elif self._waiting is not None:
                self._waiting.deadline = at

    def release(self, entry: Expiring) -> None:
        """Forget an entry. Nothing happens when it is not held."""
        self._held.pop(entry, None)
        if self._closed:
            self._end_if_idle()

    def close(self) -> None:
        """End the task as soon as nothing is held, and not only when it wakes up next."""
        self._closed = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self._held and self._waiting is not None:
            self._waiting.cancel()

    async def _run(self) -> None:
        try:
            while self._held:
                with trio.move_on_at(self._wake_at) as self._waiting:
                    await self._lot.park()
                self._waiting = None
                now = trio.current_time()
                for entry in [entry for entry, at in self._held.items() if at <= now]:
                    self.release(entry)
                    entry.expire()
                self._wake_at = max(min(self._held.values(), default=math.inf), now + _GRAIN_SECONDS)
        finally:
            self._running = False
            self._wake_at = math.inf
