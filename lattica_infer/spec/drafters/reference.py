"""The suffix drafter in Python, written to be read: what the native one must equal, scores included.

It lists every continuation of every context in full, where the native one keeps the root's sorted and cuts
lists.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

__all__ = ["SuffixReference"]

CLIMB: Final = 64
CLAIMS: Final = (0.55, 0.40, 0.62, 0.66, 0.72, 0.75, 0.78, 0.86, 0.94)
CLAIM_AFTER_FAILURE: Final = 0.37
PRIOR_WEIGHT: Final = 8.0
LATEST_BONUS: Final = 1.0


@dataclass(slots=True)
class _State:
    length: int = 0
    link: _State | None = None
    count: int = 0
    last: int = 0
    next: dict[int, _State] = field(default_factory=dict)


def _class(length: int) -> int:
    """0, 1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more."""
    return length if length <= 4 else 5 + (length > 6) + (length > 9) + (length > 15)


class SuffixReference:
    """`lattica._native.SuffixAutomaton`, slowly."""

    def __init__(self, max_tokens: int = 1 << 16) -> None:
        self._max_tokens = max_tokens
        self._records = {(longest, kind): [0, 0] for longest in (True, False) for kind in range(len(CLAIMS))}
        self._clear()

    def _clear(self) -> None:
        self._root = self._whole = _State()
        self._text: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self._text) >= self._max_tokens:
                younger = self._text[-(self._max_tokens // 2) :]
                self._clear()
                for kept in younger:
                    self._push(kept)
            self._learn(token)
            self._push(token)

    def _contexts(self, state: _State | None) -> Iterator[tuple[_State, bool]]:
        """A state and its suffixes down to the root, without those that know no token more; True: the longest."""
        fanout, longest = 0, True
        while state is not None:
            if len(state.next) > fanout:
                yield state, longest
                fanout, longest = len(state.next), False
            state = state.link

    def _learn(self, token: int) -> None:
        for state, longest in self._contexts(self._whole.link):
            record = self._records[longest, _class(state.length)]
            record[1] += 1
            if token in state.next:
                record[0] += 1
                return

    def _push(self, token: int) -> None:
        self._text.append(token)
        new = _State(self._whole.length + 1, self._root, 0, len(self._text))
        state: _State | None = self._whole
        self._whole = new
        while state is not None and token not in state.next:
            state.next[token] = new
            state = state.link
        if state is not None:
            target = state.next[token]
            if state.length + 1 < target.length:
                split = _State(state.length + 1, target.link, target.count, target.last, dict(target.next))
                while state is not None and state.next.get(token) is target:
                    state.next[token] = split
                    state = state.link
                target.link = target = split
            new.link = target
        suffix: _State | None = new
        for _ in range(CLIMB):
            if suffix is None or suffix is self._root:
                break
            suffix.count += 1
            suffix.last = len(self._text)
            suffix = suffix.link

    def _claim(self, length: int, longest: bool) -> float:
        known, seen = self._records[longest, _class(length)]
        prior = CLAIMS[_class(length)] if longest else CLAIM_AFTER_FAILURE
        return (known + prior * PRIOR_WEIGHT) / (seen + PRIOR_WEIGHT)

    def _candidates(self, context: _State, length: int, score: float) -> list[tuple[float, int, _State, int]]:
        """(score, token, state, match length) of all that may follow, likeliest first."""
        found: dict[int, tuple[float, int, _State, int]] = {}
        left = score
        for state, longest in self._contexts(context):
            length = length if state is context else state.length
            fresh = {token: to for token, to in state.next.items() if token not in found}
            claim = self._claim(length, longest)
            whole = sum(to.count for to in fresh.values()) + LATEST_BONUS
            latest = max(to.last for to in fresh.values())
            for token, to in fresh.items():
                bonus = LATEST_BONUS if to.last == latest else 0.0
                found[token] = (left * claim * (to.count + bonus) / whole, token, to, length + 1)
            left *= 1.0 - claim
        return sorted(found.values(), key=lambda candidate: (-candidate[0], candidate[1]))

    def draft(self, budget: int) -> tuple[list[int], list[int], list[float]]:
        if not self._text:
            raise ValueError("no token yet: a tree's node 0 is the last one")
        tokens, parents, scores = [self._text[-1]], [-1], [1.0]
        waiting: list[tuple[float, int, int, int, _State, int]] = []
        arrivals = count()
        context, length = self._whole.link or self._root, (self._whole.link or self._root).length
        while len(tokens) <= budget:
            for score, token, to, matched in self._candidates(context, length, scores[-1])[:budget]:
                heapq.heappush(waiting, (-score, next(arrivals), len(tokens) - 1, token, to, matched))
            if not waiting:
                break
            score, _, parent, token, context, length = heapq.heappop(waiting)
            tokens.append(token)
            parents.append(parent)
            scores.append(-score)
        return tokens, parents, scores
