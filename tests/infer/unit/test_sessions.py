"""A shard's bounds hold whatever its peers do, and a frame that does not continue the last one is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import OverloadedError, RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica_infer.errors import CacheFullError
from lattica_infer.messages import SessionSpec, StepFrame
from lattica_infer.shard.sessions import SessionLimits, Sessions

PEERS = [PeerId.from_public_key(bytes([n]) * 32) for n in range(1, 5)]
ADA, BOB, *_ = PEERS
LIMITS = SessionLimits(
    rows_per_session=100, rows_per_peer=150, rows=220, sessions_per_peer=3, sessions=4, lease_seconds=10.0
)


def spec(name: int = 0, *, rows: int = 10, epoch: int = 0) -> SessionSpec:
    return SessionSpec(
        session=name.to_bytes(16, "big"),
        model=Cid.of(b"model"),
        layers=range(4),
        rows=rows,
        previous=ADA,
        next=None,
        epoch=epoch,
    )


def frame(
    window: int = 0, base: int = 0, commit: tuple[int, ...] = (), parents: tuple[int, ...] = (-1, 0, 0)
) -> StepFrame:
    return StepFrame(0, window, base, commit, tuple(range(len(parents))), parents, walk=True)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "close", "expire"]),
            st.sampled_from(PEERS),
            st.integers(0, 5),
            st.integers(1, 120),
        ),
        max_size=60,
    )
)
def test_no_sequence_of_requests_passes_a_bound(steps: list[tuple[str, PeerId, int, int]]) -> None:
    sessions, now = Sessions(LIMITS), 0.0
    held: dict[tuple[PeerId, bytes], int] = {}
    for action, peer, name, rows in steps:
        now += 1.0
        if action == "admit":
            try:
                session = sessions.admit(peer, spec(name, rows=rows), now=now)
            except (CacheFullError, OverloadedError, RemoteProtocolError):
                continue
            held[session.key] = rows
        elif action == "close" and (open_one := sessions.find(peer, spec(name).session)):
            sessions.close(open_one)
            del held[open_one.key]
        elif action == "expire":
            for old in sessions.expired(now):
                sessions.close(old)
                del held[old.key]
        theirs = {owner: sum(n for (who, _), n in held.items() if who == owner) for owner in PEERS}
        assert sessions.rows == sum(held.values()) <= LIMITS.rows
        assert len(sessions) == len(held) <= LIMITS.sessions
        assert max(theirs.values()) <= LIMITS.rows_per_peer


def test_a_session_larger_than_the_limit_is_told_the_limit() -> None:
    with pytest.raises(CacheFullError, match=r"101 cache rows asked.*at most 100"):
        Sessions(LIMITS).admit(ADA, spec(rows=101), now=0)


def test_one_peer_cannot_take_every_row() -> None:
    sessions = Sessions(LIMITS)
    sessions.admit(ADA, spec(1, rows=100), now=0)
    with pytest.raises(CacheFullError, match="51 cache rows asked beside the 100"):
        sessions.admit(ADA, spec(2, rows=51), now=0)
    assert sessions.admit(BOB, spec(2, rows=51), now=0).owner == BOB


def test_a_full_shard_says_that_it_is_full_now() -> None:
    sessions = Sessions(LIMITS)
    for peer in (ADA, BOB):
        sessions.admit(peer, spec(rows=100), now=0)
    with pytest.raises(OverloadedError, match="2 sessions hold 200 rows"):
        sessions.admit(PEERS[2], spec(rows=21), now=0)


def test_a_peer_opens_no_more_sessions_than_the_limit() -> None:
    sessions = Sessions(LIMITS)
    for name in range(3):
        sessions.admit(ADA, spec(name), now=0)
    with pytest.raises(OverloadedError, match="3 sessions open here"):
        sessions.admit(ADA, spec(3), now=0)


def test_the_same_session_opens_once_for_each_owner() -> None:
    sessions = Sessions(LIMITS)
    sessions.admit(ADA, spec(), now=0)
    sessions.admit(BOB, spec(), now=0)
    with pytest.raises(RemoteProtocolError, match="open already"):
        sessions.admit(ADA, spec(), now=0)


def test_an_epoch_that_is_not_served_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="epoch 1"):
        Sessions(LIMITS).admit(ADA, spec(epoch=1), now=0)


def test_a_lease_ends_unless_it_is_renewed() -> None:
    sessions = Sessions(LIMITS)
    assert sessions.deadline() == math.inf
    silent = sessions.admit(ADA, spec(1), now=0)
    heard = sessions.admit(ADA, spec(2), now=0)
    sessions.renew(heard, now=9)
    assert sessions.deadline() == 10
    assert sessions.expired(9.9) == []
    assert sessions.expired(10) == [silent]
    sessions.close(silent)
    assert sessions.deadline() == 19


def test_frames_follow_the_committed_path() -> None:
    session = Sessions(LIMITS).admit(ADA, spec(rows=20), now=0)
    session.accept(frame(0, 0, (), (-1, 0, 1, 0)))
    session.accept(frame(1, 3, (0, 1, 2), (-1,)))
    session.accept(frame(2, 3, ()))  # the rows of the last frame are dropped: nothing of it was kept
    assert (session.committed, session.received) == (3, 3)


@pytest.mark.parametrize("commit", [(1,), (0, 2, 1), (0, 0), (0, 1, 3), (0, 4)])
def test_a_commit_that_is_no_path_of_the_last_tree_is_refused(commit: tuple[int, ...]) -> None:
    session = Sessions(LIMITS).admit(ADA, spec(rows=20), now=0)
    session.accept(frame(0, 0, (), (-1, 0, 1, 0)))
    with pytest.raises(RemoteProtocolError, match="no path of the last frame"):
        session.accept(frame(1, len(commit), commit))


def test_a_wrong_base_is_refused() -> None:
    session = Sessions(LIMITS).admit(ADA, spec(rows=20), now=0)
    with pytest.raises(RemoteProtocolError, match="base 1 where 0 rows"):
        session.accept(frame(0, 1))


def test_a_frame_of_another_epoch_is_refused() -> None:
    session = Sessions(LIMITS).admit(ADA, spec(rows=20), now=0)
    with pytest.raises(RemoteProtocolError, match="epoch 1 in a session of epoch 0"):
        session.accept(dataclasses.replace(frame(), epoch=1))


@pytest.mark.parametrize("window", [0, 2])
def test_a_frame_that_is_not_the_next_one_is_refused(window: int) -> None:
    session = Sessions(LIMITS).admit(ADA, spec(rows=20), now=0)
    session.accept(frame(0))
    with pytest.raises(RemoteProtocolError, match=f"window {window} where 1 is next"):
        session.accept(frame(window))


def test_rows_beyond_the_grant_are_refused() -> None:
    session = Sessions(LIMITS).admit(ADA, spec(rows=4), now=0)
    session.accept(frame(0))
    with pytest.raises(CacheFullError, match="4 cache rows: 2 are committed, the frame brings 3"):
        session.accept(frame(1, 2, (0, 1)))


def test_limits_share_the_memory_that_is_there() -> None:
    limits = SessionLimits.for_memory(1_000_000, row_bytes=1000, context=300)
    assert (limits.rows, limits.rows_per_peer, limits.rows_per_session) == (1000, 556, 556)
    small = SessionLimits.for_memory(100_000, row_bytes=1000, context=300)
    assert (small.rows, small.rows_per_peer, small.rows_per_session) == (100, 100, 100)
