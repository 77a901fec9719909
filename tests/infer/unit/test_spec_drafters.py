from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica._native import SuffixAutomaton
from lattica_infer.spec.drafters import DRAFTERS, make_drafter
from lattica_infer.spec.drafters.reference import SuffixReference

# Few symbols repeat a lot; many let contexts fail.
texts = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=120),
    st.lists(st.integers(0, 30), min_size=1, max_size=120),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    st.builds(
        lambda unit, times: unit * times,
        st.lists(st.integers(0, 9), min_size=1, max_size=9),
        st.integers(1, 30),
    ),
)


@given(texts, st.integers(0, 40), st.sampled_from([2, 7, 50, 65536]))
def test_native_and_reference_draft_the_same_tree(text: list[int], budget: int, max_tokens: int) -> None:
    native, reference = SuffixAutomaton(max_tokens), SuffixReference(max_tokens)
    cut = len(text) // 2
    for part in (text[:cut], text[cut:]):
        native.extend(part)
        reference.extend(part)
    assert native.draft(budget) == reference.draft(budget)


@given(texts, st.integers(0, 64), st.sampled_from(DRAFTERS))
def test_a_draft_is_a_tree_below_the_last_token_within_budget(
    text: list[int], budget: int, name: str
) -> None:
    drafter = make_drafter(name)
    drafter.begin(text[:1])
    drafter.extend(text[1:])
    tree = drafter.draft(budget)
    assert tree.tokens[0] == text[-1]
    assert len(tree) <= budget + 1
    assert set(tree.tokens) <= set(text)
    assert tree.scores is not None
    assert list(tree.scores) == sorted(tree.scores, reverse=True)
    pairs = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(pairs)) == len(pairs), "a node twice below one parent is a node wasted"


def test_a_long_match_grows_a_deep_chain_and_a_short_one_a_wide_bush() -> None:
    drafter = make_drafter("suffix")
    drafter.begin([*range(40), *range(20)])
    deep = drafter.draft(16)
    drafter.begin([7, 1, 7, 2, 7, 3, 7, 4, 7, 5, 7])
    wide = drafter.draft(16)
    assert tuple(deep.tokens[:9]) == tuple(range(19, 28))
    assert max(deep.depths) >= 8
    assert wide.parents.count(0) >= 5


def test_begin_forgets_the_text_before() -> None:
    drafter = make_drafter("suffix")
    drafter.begin([1, 2, 3, 1, 2])
    drafter.begin([1, 2])
    assert 3 not in drafter.draft(10).tokens


def test_the_latest_continuation_comes_before_an_older_one_as_frequent() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([5, 1, 9, 5, 2, 8, 5])
    tokens, parents, _ = automaton.draft(1)
    assert (tokens, parents) == ([5, 2], [-1, 0])


def test_a_full_automaton_goes_on_with_the_younger_half() -> None:
    automaton = SuffixAutomaton(max_tokens=64)
    for start in range(0, 100_000, 1000):
        automaton.extend(range(start, start + 1000))
    automaton.extend([99_990, 99_991])
    assert automaton.draft(3)[0][:4] == [99_991, 99_992, 99_993, 99_994]


def test_no_text_no_draft() -> None:
    with pytest.raises(ValueError, match="no token yet"):
        SuffixAutomaton().draft(3)


@pytest.mark.parametrize("max_tokens", [0, 1, 65537])
def test_memory_is_bounded(max_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        SuffixAutomaton(max_tokens)


def test_an_unknown_drafter_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'eagle'; there are none, suffix, auto"):
        make_drafter("eagle")
