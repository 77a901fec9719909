"""When to dial the bootstrap peers. Never waits, reads no clock, opens nothing.

Each peer of the list is dialled at once, then after a delay that doubles up to five minutes, and again from
the start when its connection is lost. Delays are drawn between a half and the whole, so that a mesh whose
bootstrap peer restarts does not come back as one wave (AWS, "Exponential Backoff And Jitter").
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lattica import multiaddr
from lattica.ids import PeerId

FIRST_DELAY_SECONDS: Final = 1.0  # a peer that was restarted is back by then
LONGEST_DELAY_SECONDS: Final = 300.0  # a peer that has been away for hours costs twelve dials an hour


@dataclass(slots=True)
class _Entry:
    addresses: list[str]
    due: float  # when to dial; inf while connected or dialling
    failures: int = 0
    connected: bool = False


class BootstrapPolicy:
    """Keeps one connection to each peer of a list: fed what happened, asked whom to dial.

    Args:
        addresses: multiaddrs that end in `/p2p/ID`; several of one peer are alternatives.
        rng: draws the jitter.
        now: seconds on any clock that only goes forward; the same clock everywhere below.
    """

    def __init__(self, addresses: Iterable[str], *, rng: random.Random, now: float) -> None:
        self._rng = rng
        self._entries: dict[PeerId, _Entry] = {}
        for address in addresses:
            peer = multiaddr.peer_of(address)
            assert peer is not None, "config lets no address without /p2p/ through"
            self._entries.setdefault(peer, _Entry([], now)).addresses.append(address)

    @property
    def peers(self) -> list[PeerId]:
        """The peers of the list, in its order."""
        return list(self._entries)

    def addresses(self, peer: PeerId) -> list[str]:
        """Where a peer of the list may be dialled."""
        return list(self._entries[peer].addresses)

    def poll(self, now: float) -> list[PeerId]:
        """Whom to dial now. Each is given once: it counts as being dialled until `on_...` says otherwise."""
        due = [peer for peer, entry in self._entries.items() if entry.due <= now]
        for peer in due:
            self._entries[peer].due = math.inf
        return due

    def deadline(self) -> float:
        """When to poll again if nothing happens; inf if never."""
        return min((entry.due for entry in self._entries.values()), default=math.inf)

    def on_connected(self, peer: PeerId) -> None:
        """A connection to `peer` is up, no matter who dialled."""
        if entry := self._entries.get(peer):
            entry.connected, entry.failures, entry.due = True, 0, math.inf

    def on_lost(self, peer: PeerId, now: float) -> None:
        """The last connection to `peer` is gone."""
        if (entry := self._entries.get(peer)) and entry.connected:
            entry.connected = False
            entry.due = now + self._delay(entry)

    def on_failed(self, peer: PeerId, now: float) -> None:
        """None of the peer's addresses answered."""
        if (entry := self._entries.get(peer)) and not entry.connected:
            entry.due = now + self._delay(entry)
            entry.failures += 1

    def _delay(self, entry: _Entry) -> float:
        # The exponent is held down before the power is taken: 2**1100 is no float.
        whole = min(FIRST_DELAY_SECONDS * 2.0 ** min(entry.failures, 16), LONGEST_DELAY_SECONDS)
        return whole * self._rng.uniform(0.5, 1.0)
