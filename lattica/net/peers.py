"""PeerTable: what this node knows of other peers: where they may be dialled, how far they are, what they
speak.

Pure: time is an argument, in seconds of any one clock. Bounded: peers that we are not connected to are
forgotten, the longest unheard first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lattica.ids import PeerId
from lattica.net.api import Path, Peer
from lattica.protocols import MAX_PEERS_KNOWN

MAX_ADDRESSES = 16  # kept per peer, the newest; as many as one dial tries
RTT_WEIGHT = 1 / 8  # of a new sample: RFC 6298, section 2


@dataclass(slots=True)
class _Entry:
    peer: Peer
    addresses: list[str] = field(default_factory=list)  # where it may be dialled, best first
    connected: bool = False
    heard: float = 0.0


class PeerTable:
    """Feed it what happened; ask it for the peers."""

    def __init__(self) -> None:
        self._entries: OrderedDict[PeerId, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def learn(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Somebody said where a peer may be dialled; the newest stand first."""
        entry = self._entry(peer)
        entry.addresses = list(dict.fromkeys([*addresses, *entry.addresses]))[:MAX_ADDRESSES]
        self._make_room()

    def addresses(self, peer: PeerId) -> list[str]:
        """Where a peer may be dialled, best first; empty when nothing is known."""
        entry = self._entries.get(peer)
        return list(entry.addresses) if entry else []

    def connected(
        self, peer: PeerId, *, address: str, inbound: bool, now: float, path: Path = "direct"
    ) -> None:
        """A peer's first connection opened; `address` is its transport address as we see it."""
        entry = self._entry(peer)
        entry.connected = True
        entry.heard = now
        entry.peer = Peer(peer, path=path, addresses=(address,), inbound=inbound)
        if not inbound:  # it answered there: the best address we know
            self.learn(peer, [address])

    def disconnected(self, peer: PeerId, *, now: float) -> None:
        """A peer's last connection ended; its addresses are kept."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.connected = False
            self._entries.move_to_end(peer)
            self._make_room()

    def identified(
        self, peer: PeerId, *, agent: str, protocols: tuple[str, ...], addresses: tuple[str, ...], now: float
    ) -> None:
        """A peer said what it is. Its own word on its addresses replaces what others said."""
        entry = self._entry(peer)
        entry.heard = now
        entry.peer = replace(
            entry.peer, agent=agent, protocols=protocols, addresses=addresses or entry.peer.addresses
        )
        if addresses:
            proven = entry.addresses[:1] if entry.connected and not entry.peer.inbound else []
            entry.addresses = list(dict.fromkeys([*proven, *addresses]))[:MAX_ADDRESSES]

    def pinged(self, peer: PeerId, rtt: float, *, now: float) -> None:
        """A ping came back after `rtt` seconds."""
        entry = self._entry(peer)
        entry.heard = now
        known = entry.peer.rtt
        entry.peer = replace(entry.peer, rtt=rtt if known is None else known + RTT_WEIGHT * (rtt - known))

    def heard(self, peer: PeerId, *, at: float) -> None:
        """Something came from a peer at that time."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.heard = max(entry.heard, at)

    def peers(self, *, now: float) -> list[Peer]:
        """The connected peers; `seen` counts from the last sign of life."""
        return [
            replace(entry.peer, seen=max(0.0, now - entry.heard))
            for entry in self._entries.values()
            if entry.connected
        ]

    def spoken(self, peer: PeerId) -> frozenset[str]:
        """The protocols that a connected peer says it speaks."""
        entry = self._entries.get(peer)
        return frozenset(entry.peer.protocols) if entry is not None and entry.connected else frozenset()

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a peer has a connection now."""
        entry = self._entries.get(peer)
        return entry is not None and entry.connected

    def _entry(self, peer: PeerId) -> _Entry:
        entry = self._entries.get(peer)
        if entry is None:
            entry = self._entries[peer] = _Entry(Peer(peer))
        return entry

    def _make_room(self) -> None:
        if len(self._entries) <= MAX_PEERS_KNOWN:
            return
        spare = [peer for peer, entry in self._entries.items() if not entry.connected]
        for peer in spare[: max(0, len(spare) - MAX_PEERS_KNOWN)]:
            del self._entries[peer]
