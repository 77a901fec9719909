"""The bootstrap list: dialled at once, backed off, dialled again when lost."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from lattica.bootstrap import FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS, BootstrapPolicy
from lattica.ids import PeerId

ADA, BOB = (PeerId.from_public_key(bytes([number]) * 32) for number in (1, 2))
ADDRESSES = [
    f"/ip4/127.0.0.1/tcp/1/p2p/{ADA}",
    f"/ip4/127.0.0.1/tcp/2/p2p/{BOB}",
    f"/ip6/::1/tcp/1/p2p/{ADA}",
]


def a_policy(seed: int = 1) -> BootstrapPolicy:
    return BootstrapPolicy(ADDRESSES, rng=random.Random(seed), now=100.0)


def test_every_peer_is_dialled_at_once_and_once() -> None:
    policy = a_policy()
    assert policy.deadline() == 100
    assert policy.poll(100.0) == [ADA, BOB] == policy.peers
    assert policy.poll(1e9) == []
    assert policy.deadline() == math.inf


def test_addresses_of_one_peer_are_alternatives() -> None:
    assert a_policy().addresses(ADA) == [ADDRESSES[0], ADDRESSES[2]]


def test_an_empty_list_asks_for_nothing() -> None:
    policy = BootstrapPolicy([], rng=random.Random(1), now=0)
    assert policy.poll(1e9) == []
    assert policy.deadline() == math.inf


@given(seed=st.integers(), failures=st.integers(1, 40) | st.just(1100))
def test_delays_double_with_jitter_and_stop_growing(seed: int, failures: int) -> None:
    policy, now = a_policy(seed), 100.0
    for _ in range(failures):
        policy.poll(now)
        policy.on_connected(BOB)
        policy.on_failed(ADA, now)
        waited, now = policy.deadline() - now, policy.deadline()
    whole = min(FIRST_DELAY_SECONDS * 2 ** min(failures - 1, 30), LONGEST_DELAY_SECONDS)
    assert whole / 2 - 1e-6 <= waited <= whole + 1e-6


def test_a_lost_peer_is_dialled_again_from_the_first_delay() -> None:
    policy = a_policy()
    policy.poll(100)
    for _ in range(5):
        policy.on_failed(ADA, 100)
    policy.on_connected(ADA)
    assert policy.poll(1e6) == []
    policy.on_lost(ADA, 200)
    assert 200 < policy.deadline() <= 200 + FIRST_DELAY_SECONDS
    assert policy.poll(201) == [ADA]


def test_a_peer_that_dialled_us_is_not_dialled() -> None:
    policy = a_policy()
    policy.on_connected(ADA)
    assert policy.poll(100) == [BOB]


def test_a_dial_that_fails_beside_a_live_connection_changes_nothing() -> None:
    policy = a_policy()
    policy.poll(100)
    policy.on_connected(ADA)
    policy.on_failed(ADA, 100)
    assert policy.poll(1e9) == []


def test_strangers_change_nothing() -> None:
    policy = a_policy()
    stranger = PeerId.from_public_key(bytes(32))
    policy.on_connected(stranger)
    policy.on_lost(stranger, 100)
    policy.on_failed(stranger, 100)
    assert policy.peers == [ADA, BOB]


def test_two_nodes_do_not_come_back_as_one_wave() -> None:
    delays = set()
    for seed in range(10):
        policy = a_policy(seed)
        policy.poll(100)
        policy.on_failed(ADA, 100)
        delays.add(policy.deadline())
    assert len(delays) == 10
