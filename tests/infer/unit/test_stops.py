"""Stop strings cut the text where they begin, however the tokens fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica_infer.client.stops import StopScanner
from lattica_infer.errors import InferenceError

texts = st.lists(st.text("ab", max_size=3), max_size=20)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def run(tokens: list[str], stops: list[str]) -> tuple[list[tuple[int, str]], bool]:
    scanner: StopScanner[int] = StopScanner(stops)
    out: list[tuple[int, str]] = []
    for index, text in enumerate(tokens):
        out += scanner.feed(index, text)
        if scanner.stopped:
            return out, True
    return out + scanner.flush(), False


@given(texts, stop_lists)
def test_the_text_ends_where_the_first_complete_stop_begins(tokens: list[str], stops: list[str]) -> None:
    out, stopped = run(tokens, stops)
    expected = "".join(tokens)
    for end in range(1, len(tokens) + 1):
        seen = "".join(tokens[:end])
        if any(stop in seen for stop in stops):
            expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
            break
    assert "".join(text for _, text in out) == expected
    assert stopped == any(stop in "".join(tokens) for stop in stops)


@given(texts, stop_lists)
def test_tokens_come_out_in_order_and_whole_but_for_the_last(tokens: list[str], stops: list[str]) -> None:
    out, _ = run(tokens, stops)
    assert [index for index, _ in out] == list(range(len(out)))
    assert all(text == tokens[index] for index, text in out[:-1])


def test_text_that_no_stop_can_begin_with_is_not_held() -> None:
    scanner: StopScanner[int] = StopScanner(["END"])
    assert scanner.feed(0, "the E") == []
    assert scanner.feed(1, "ast") == [(0, "the E"), (1, "ast")]


@pytest.mark.parametrize("stops", [[""], ["x"] * 17, ["x" * 1025]])
def test_stop_strings_out_of_bounds_are_refused(stops: list[str]) -> None:
    with pytest.raises(InferenceError, match="stop takes at most 16 strings"):
        StopScanner(stops)
