"""The cheapest whole chain is found; when there is none, the fewest layers that would make one are named."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.ids import PeerId
from lattica_infer.client.route import Candidate, Plan, cheapest, no_route

PEERS = [PeerId.from_public_key(bytes([n]) * 32) for n in range(1, 9)]


def shard(
    peer: int, first: int, stop: int, *, rtt: float | None = 0.01, numeric_class: str = "a"
) -> Candidate:
    return Candidate(PEERS[peer], range(first, stop), numeric_class, (), rtt)


candidates = st.lists(
    st.builds(
        lambda peer, first, length, rtt, name: shard(
            peer, first, min(6, first + length), rtt=rtt / 1000, numeric_class=name
        ),
        st.integers(0, 7),
        st.integers(0, 5),
        st.integers(1, 6),
        st.integers(1, 200),
        st.sampled_from(["a", "b"]),
    ),
    max_size=9,
)


def every_chain(shards: list[Candidate], layers: int, at: int = 0) -> list[tuple[Candidate, ...]]:
    if at == layers:
        return [()]
    starts = [shard for shard in shards if shard.layers.start == at]
    return [(first, *rest) for first in starts for rest in every_chain(shards, layers, first.layers.stop)]


@given(candidates)
def test_the_plan_is_the_best_of_all_chains(shards: list[Candidate]) -> None:
    plan = cheapest(shards, 6)
    chains = every_chain(shards, 6)
    pure = [chain for chain in chains if len({stage.numeric_class for stage in chain}) == 1]
    if not chains:
        assert plan.missing
        return
    best = min(sum(stage.cost_seconds for stage in chain) for chain in pure or chains)
    assert plan.complete
    assert plan.stages in chains
    assert math.isclose(plan.seconds, best)
    assert bool(pure) == (len(plan.numeric_classes) == 1)


@given(candidates)
def test_serving_the_missing_layers_makes_a_route_and_fewer_do_not(shards: list[Candidate]) -> None:
    missing = cheapest(shards, 6).missing
    single = [Candidate(PEERS[0], range(layer, layer + 1), "a") for layer in range(6)]
    assert cheapest([*shards, *(single[layer] for layer in missing)], 6).complete
    for fewer in itertools.combinations(range(6), max(len(missing) - 1, 0)):
        if missing:
            assert not cheapest([*shards, *(single[layer] for layer in fewer)], 6).complete


@given(candidates, st.randoms(use_true_random=False))
def test_the_order_of_announcements_does_not_matter(shards: list[Candidate], shuffle: random.Random) -> None:
    other = list(shards)
    shuffle.shuffle(other)
    assert cheapest(shards, 6) == cheapest(other, 6)


def test_equal_costs_go_to_the_lower_peer_id() -> None:
    first, second = sorted([shard(0, 0, 4), shard(1, 0, 4)], key=lambda c: str(c.peer))
    assert cheapest([second, first], 4).stages == (first,)


def test_a_near_chain_of_two_beats_one_far_shard() -> None:
    near = [shard(1, 0, 2, rtt=0.01), shard(2, 2, 4, rtt=0.01)]
    assert cheapest([shard(0, 0, 4, rtt=0.2), *near], 4).stages == tuple(near)


def test_one_numeric_class_is_worth_a_longer_way() -> None:
    pure = [shard(0, 0, 2, rtt=0.2), shard(1, 2, 4, rtt=0.2)]
    assert cheapest([*pure, shard(2, 0, 2, rtt=0.01, numeric_class="b")], 4).stages == tuple(pure)


def test_a_shard_beyond_the_model_is_no_candidate() -> None:
    assert cheapest([shard(0, 0, 9)], 4).missing == (0, 1, 2, 3)


def test_overlapping_shards_that_hand_over_nowhere_miss_a_bridge() -> None:
    assert cheapest([shard(0, 0, 3), shard(1, 2, 6)], 6).missing == (0, 1)


SERVE = "lattica shard serve tiny --layers"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (
            (2, 3, 4, 9),
            f'layers 2-4, 9 have no live shard (2 found); serve with "{SERVE} 2:5" and "{SERVE} 9:10"',
        ),
        ((7,), f'layer 7 has no live shard (2 found); serve with "{SERVE} 7:8"'),
    ],
)
def test_the_error_says_how_to_fill_the_gaps(missing: tuple[int, ...], words: str) -> None:
    error = no_route(Plan((), missing, 0.0), "tiny", found=2)
    assert str(error) == f"no route: {words}"
    assert error.missing == missing
