"""Who may use a shard's cache, how much of it, for how long, and in which order. Pure: `now` is an argument.

`Sessions` is the table and its bounds; `Session` is one entry and checks that each frame continues the one
before it. Neither knows tensors, streams or tasks: `shard/service.py` acts on what they say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from lattica.errors import OverloadedError, RemoteProtocolError
from lattica.ids import PeerId
from lattica_infer.errors import CacheFullError
from lattica_infer.messages import SessionSpec, StepFrame

LEASE_SECONDS: Final = 20.0  # a coordinator renews every second; a home router's restart of its link fits in
TREE_ROWS: Final = 256  # scratch rows beyond the context: a prompt chunk or a draft tree at the very end


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one shard grants. Rows are token positions in its cache."""

    rows_per_session: int
    rows_per_peer: int
    rows: int
    sessions_per_peer: int = 16
    sessions: int = 64
    lease_seconds: float = LEASE_SECONDS

    @classmethod
    def for_memory(cls, cache_bytes: int, *, row_bytes: int, context: int) -> SessionLimits:
        """Limits that keep every session's rows within `cache_bytes`; half of it at most for one peer."""
        rows = cache_bytes // max(row_bytes, 1)
        one = min(context + TREE_ROWS, rows)
        return cls(rows_per_session=one, rows_per_peer=max(one, rows // 2), rows=rows)


@dataclass(slots=True, eq=False)
class Session:
    """One coordinator's use of one shard, from `open` to its end."""

    owner: PeerId
    spec: SessionSpec
    expires: float
    committed: int = 0  # rows of the cache that are settled text
    received: int = 0  # frames
    sent: int = 0
    bytes_sent: int = 0
    _parents: tuple[int, ...] = field(default=())  # of the last frame: its rows are the scratch

    @property
    def key(self) -> tuple[PeerId, bytes]:
        return self.owner, self.spec.session

    def accept(self, frame: StepFrame) -> None:
        """Check that `frame` continues the last one, and count its rows.

        Raises:
            RemoteProtocolError: another epoch, a frame that is not the next one, a commit that is no path of
                the last frame, or a base that isn't where the prefix now ends.
            CacheFullError: the frame needs more rows than the session was granted.
        """
        if frame.epoch != self.spec.epoch:
            raise RemoteProtocolError(f"epoch {frame.epoch} in a session of epoch {self.spec.epoch}")
        if frame.window != self.received:
            raise RemoteProtocolError(f"window {frame.window} where {self.received} is next")
        parent = -1
        for node in frame.commit:
            if node >= len(self._parents) or self._parents[node] != parent:
                raise RemoteProtocolError(f"commit {list(frame.commit)} is no path of the last frame")
            parent = node
        committed = self.committed + len(frame.commit)
        if frame.base != committed:
            raise RemoteProtocolError(f"a frame with base {frame.base} where {committed} rows are committed")
        if committed + len(frame.tokens) > self.spec.rows:
            raise CacheFullError(
                f"the session has {self.spec.rows} cache rows: {committed} are committed, the frame brings "
                f"{len(frame.tokens)} more"
            )
        self.committed = committed
        self.received += 1
        self._parents = frame.parents


class Sessions:
    """The open sessions of one shard, and the room that is left."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self._open: dict[tuple[PeerId, bytes], Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def rows(self) -> int:
        """Cache rows granted to the open sessions together."""
        return sum(session.spec.rows for session in self._open.values())

    def admit(self, owner: PeerId, spec: SessionSpec, *, now: float) -> Session:
        """Grant a session its rows.

        Raises:
            CacheFullError: more rows than one session, or one peer, may have.
            OverloadedError: other peers' sessions fill the shard now.
            RemoteProtocolError: the peer has a session of this name, or names an epoch (none are served yet).
        """
        limits = self.limits
        if spec.epoch != 0:
            raise RemoteProtocolError(f"epoch {spec.epoch}: this version opens sessions in epoch 0")
        if (owner, spec.session) in self._open:
            raise RemoteProtocolError(f"session {spec.session.hex()} is open already")
        if spec.rows > limits.rows_per_session:
            raise CacheFullError(
                f"{spec.rows} cache rows asked, and a session here gets at most {limits.rows_per_session}: "
                "shorten the prompt or max_tokens"
            )
        theirs = [session for session in self._open.values() if session.owner == owner]
        held = sum(session.spec.rows for session in theirs)
        if held + spec.rows > limits.rows_per_peer:
            raise CacheFullError(
                f"{spec.rows} cache rows asked beside the {held} that you hold, and a peer here gets at most "
                f"{limits.rows_per_peer}: wait for your other sessions"
            )
        if len(theirs) >= limits.sessions_per_peer:
            raise OverloadedError(f"you have {len(theirs)} sessions open here, the most that a peer gets")
        if len(self._open) >= limits.sessions or self.rows + spec.rows > limits.rows:
            raise OverloadedError(f"the shard is full: {len(self._open)} sessions hold {self.rows} rows")
        session = Session(owner, spec, now + limits.lease_seconds)
        self._open[session.key] = session
        return session

    def find(self, owner: PeerId, session: bytes) -> Session | None:
        return self._open.get((owner, session))

    def renew(self, session: Session, *, now: float) -> None:
        """The coordinator was heard of: its lease starts again."""
        session.expires = now + self.limits.lease_seconds

    def expired(self, now: float) -> list[Session]:
        """The sessions whose lease ran out, oldest first. They stay open until `close`."""
        return sorted((s for s in self._open.values() if s.expires <= now), key=lambda s: s.expires)

    def deadline(self) -> float:
        """When the next lease runs out; inf when no session is open."""
        return min((session.expires for session in self._open.values()), default=math.inf)

    def close(self, session: Session) -> None:
        """Give the rows back; nothing happens when it is closed already."""
        if self._open.get(session.key) is session:
            del self._open[session.key]
