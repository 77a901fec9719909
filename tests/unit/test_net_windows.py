from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.net.windows import (
    EASY_WINDOW,
    GROW_WITHIN_ROUND_TRIPS,
    INITIAL_WINDOW,
    MIN_ROUND_TRIP,
    ReceiveWindow,
    ReferenceBudget,
)


@pytest.mark.parametrize(
    ("round_trips", "rtt", "grows"),
    [
        (GROW_WITHIN_ROUND_TRIPS - 0.1, 0.1, True),
        (GROW_WITHIN_ROUND_TRIPS + 0.1, 0.1, False),
        (GROW_WITHIN_ROUND_TRIPS + 0.1, MIN_ROUND_TRIP / 2, True),
    ],
    ids=["within", "beyond", "on a short way"],
)
def test_a_window_that_is_used_up_within_some_round_trips_grows(
    round_trips: float, rtt: float, grows: bool
) -> None:
    window = ReceiveWindow(epoch=0.0, size=EASY_WINDOW, left=0)
    assert window.credit(0) == EASY_WINDOW
    assert window.wants_growth(round_trips * rtt, rtt) == grows


def test_a_small_window_grows_for_a_reader_that_keeps_up_however_long_it_lasts() -> None:
    for unread, grows in (0, True), (1, False):
        window = ReceiveWindow(epoch=0.0, left=0)
        assert window.credit(unread) == INITIAL_WINDOW - unread
        assert window.wants_growth(10.0, 0.001) == grows


def test_half_a_window_counts_for_half_the_time() -> None:
    for seconds, grows in (0.09, True), (0.11, False):
        window = ReceiveWindow(epoch=0.0, size=EASY_WINDOW, left=EASY_WINDOW // 2)
        assert window.credit(0) == EASY_WINDOW // 2
        assert window.wants_growth(seconds, 0.1) == grows


def test_growth_is_considered_once_for_each_credit() -> None:
    window = ReceiveWindow(epoch=0.0, left=0)
    window.credit(0)
    assert window.wants_growth(0.0, None)
    assert not window.wants_growth(0.0, None)


@given(
    limit=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 400), max_size=20),
)
def test_a_budget_is_never_overdrawn(limit: int, sizes: list[int]) -> None:
    budget = ReferenceBudget(limit)
    taken = [budget.take(size) for size in sizes]
    assert budget.used == sum(taken) <= limit
    for size in taken:
        budget.give_back(size)
    assert budget.used == 0
