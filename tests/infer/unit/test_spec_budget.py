from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica_infer.spec.budget import PROBE_EVERY, PROBE_NODES, STEP, Budget
from lattica_infer.spec.tree import DraftTree


def bush(nodes: int, score: float) -> DraftTree:
    """Alternatives to one another, each as likely."""
    return DraftTree(range(nodes + 1), [-1] + [0] * nodes, [1.0] + [score] * nodes)


def run(
    budget: Budget, *, fixed: float, slope: float, score: float, accepted: float, rounds: int = 200
) -> list[int]:
    """Nodes drafted in each round, where a round truly costs `fixed + nodes * slope`; `accepted` a node."""
    drafted, debt = [], 0.0
    for _ in range(rounds):
        nodes = len(budget.keep(bush(budget.next(), score))) - 1
        debt += accepted * nodes
        drafted.append(nodes)
        budget.observe(nodes=nodes, accepted=int(debt), seconds=fixed + nodes * slope)
        debt -= int(debt)
    return drafted


def test_costs_are_learned_from_rounds_of_different_width() -> None:
    budget = Budget(stage_seconds=0.022)
    for nodes in [0, 5, 20, 3, 40, 10] * 30:
        budget.observe(nodes=nodes, accepted=0, seconds=0.3 + 0.004 * nodes)
    assert budget.fixed_seconds == pytest.approx(0.3, rel=0.1)
    assert budget.node_seconds == pytest.approx(0.004, rel=0.1)


def test_a_longer_round_trip_grows_the_tree() -> None:
    last = [
        run(Budget(), fixed=0.03 + trip, slope=0.0015, score=0.04, accepted=0.04)[-1]
        for trip in (0.0, 0.05, 0.5)
    ]
    assert last[0] < last[1] <= last[2] == 64


def test_nothing_is_drafted_where_drafting_does_not_pay_but_it_is_tried_now_and_then() -> None:
    drafted = run(Budget(), fixed=0.01, slope=0.01, score=0.9, accepted=0.0)[-4 * PROBE_EVERY :]
    assert max(drafted) <= PROBE_NODES
    assert drafted.count(0) >= 3 * PROBE_EVERY
    assert any(drafted)


def test_drafting_comes_back_when_it_pays_again() -> None:
    budget = Budget()
    run(budget, fixed=0.02, slope=0.002, score=0.5, accepted=0.0)
    assert run(budget, fixed=0.02, slope=0.002, score=0.5, accepted=0.5)[-1] > 0


def test_scores_are_calibrated_by_what_was_accepted() -> None:
    budget = Budget()
    run(budget, fixed=0.2, slope=0.001, score=0.4, accepted=0.1)
    assert budget.calibration == pytest.approx(0.25, abs=0.1)


def test_a_node_that_pays_is_kept_and_the_next_is_not() -> None:
    budget = Budget(round_trip_seconds=0.0, stage_seconds=0.1, node_seconds=0.02)
    # 0.5 * 0.1 > 0.02 * 1; then 0.25 * 0.12 < 0.02 * 1.5, just not.
    tree = DraftTree([0, 1, 2], [-1, 0, 1], [1.0, 0.5, 0.249])
    assert len(budget.keep(tree)) == 2
    assert len(budget.keep(DraftTree([0, 1, 2], [-1, 0, 1], [1.0, 0.5, 0.251]))) == 3


def test_one_stalled_round_does_not_change_the_costs_much() -> None:
    budget = Budget()
    for nodes in [0, 5, 20, 10] * 10:
        budget.observe(nodes=nodes, accepted=nodes // 4, seconds=0.05 + 0.001 * nodes)
    before = budget.fixed_seconds
    budget.observe(nodes=10, accepted=3, seconds=600.0)
    assert budget.fixed_seconds < 1.5 * before


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 64), st.floats(0, 100)), max_size=60),
    st.integers(0, 64),
)
def test_the_cap_moves_by_a_step_and_stays_in_its_bounds(
    rounds: list[tuple[float, int, float]], max_nodes: int
) -> None:
    budget = Budget(max_nodes=max_nodes)
    for score, accepted, seconds in rounds:
        cap = budget.next()
        kept = budget.keep(bush(cap, score))
        assert len(kept) - 1 <= cap <= max_nodes
        budget.observe(nodes=len(kept) - 1, accepted=min(accepted, len(kept) - 1), seconds=seconds)
        assert abs(budget.next() - cap) <= STEP
        assert min(budget.fixed_seconds, budget.node_seconds) > 0.0


def test_a_tree_without_scores_is_cut_by_depth() -> None:
    chain = DraftTree.chain(range(17))
    assert 1 < len(Budget(round_trip_seconds=0.01).keep(chain)) < 17


@pytest.mark.parametrize(
    "settings", [{"round_trip_seconds": -1.0}, {"stage_seconds": 0.0}, {"max_nodes": -1}, {"max_nodes": 4096}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="max_nodes"):
        Budget(**settings)  # type: ignore[arg-type]
