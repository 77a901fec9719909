"""The suffix-automaton drafter: proposes what followed the last time that the text looked like this."""

from __future__ import annotations

from collections.abc import Sequence

from lattica._native import SuffixAutomaton
from lattica_infer.spec.tree import DraftTree

__all__ = ["SuffixDrafter"]


class SuffixDrafter:
    """Drafts from the prompt and the output so far; remembers nothing else.

    Every suffix of the text that occurred before votes on what comes next, longer ones first, weighed by how
    often matches of that kind were right in this very text; the tree takes the likeliest paths. A long match
    thus grows a deep chain and a short one a wide bush. Method, memory bound and costs: `SuffixAutomaton` in
    `lattica/_native.pyi`.

    Source: SAM decoding (arXiv 2411.10666), SuffixDecoding (2411.04975); blending as in PPM with secondary
        escape estimation (Shkarin 2002).
    """

    name = "suffix"

    def __init__(self) -> None:
        self._automaton = SuffixAutomaton()

    def begin(self, prompt: Sequence[int]) -> None:
        self._automaton = SuffixAutomaton()
        self._automaton.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        self._automaton.extend(tokens)

    def draft(self, budget: int) -> DraftTree:
        tokens, parents, scores = self._automaton.draft(budget)
        return DraftTree(tokens, parents, scores)
