"""Draft trees: tokens that a drafter proposes to follow the last committed token. Pure Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["MAX_NODES", "DraftTree"]

MAX_NODES: Final = 4096  # nodes of one tree, node 0 included; far above what pays, far below what hurts
_MAX_TOKEN: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A tree of token ids; node 0 is the last committed token, each path below it one proposed continuation.

    `parents[0]` is -1 and every other parent stands before its child. Siblings may carry equal tokens: the
    walk takes the one of lowest index. `scores[i]`, where the drafter has an opinion, is its estimate of the
    probability that the target's text runs through node i (`scores[0]` is 1.0).

    Raises:
        ValueError: no nodes or more than MAX_NODES, lengths that differ, a parent that does not come first, a
            token outside 32 bits, a score outside 0..1.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    scores: Sequence[float] | None = None
    depths: tuple[int, ...] = field(init=False, repr=False, compare=False)  # [nodes]; node 0 has depth 0

    def __post_init__(self) -> None:
        tokens, parents = tuple(map(int, self.tokens)), tuple(map(int, self.parents))
        if not 0 < len(tokens) <= MAX_NODES:
            raise ValueError(f"a draft tree has 1 to {MAX_NODES} nodes, not {len(tokens)}")
        if len(parents) != len(tokens):
            raise ValueError(
                f"a draft tree of {len(tokens)} tokens needs as many parents, not {len(parents)}"
            )
        if parents[0] != -1:
            raise ValueError(f"node 0 is the root, its parent is -1, not {parents[0]}")
        depths = [0] * len(tokens)
        for node in range(1, len(parents)):
            parent = parents[node]
            if not 0 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}; parents come before their children")
            depths[node] = depths[parent] + 1
        if min(tokens) < 0 or max(tokens) > _MAX_TOKEN:
            raise ValueError(f"a token id is outside 0..{_MAX_TOKEN}: {min(tokens)}..{max(tokens)}")
        if self.scores is not None:
            scores = tuple(map(float, self.scores))
            if len(scores) != len(tokens) or not all(0.0 <= score <= 1.0 for score in scores):
                raise ValueError("scores are probabilities, one a node")
            object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "depths", tuple(depths))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> DraftTree:
        """One path: `tokens[0]` the last committed token, each next one the child of the one before."""
        return cls(tokens, range(-1, len(tokens) - 1))

    @property
    def children(self) -> list[list[int]]:
        """The children of each node, lowest index first."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self.parents)):
            children[self.parents[node]].append(node)
        return children

    def head(self, nodes: int) -> DraftTree:
        """The tree's first `nodes` nodes; a tree too, since parents come first."""
        if nodes >= len(self):
            return self
        return DraftTree(
            self.tokens[:nodes], self.parents[:nodes], None if self.scores is None else self.scores[:nodes]
        )

    def shallow(self, depth: int) -> DraftTree:
        """The tree without nodes deeper than `depth`, in the same order."""
        if max(self.depths) <= depth:
            return self
        kept = [node for node, d in enumerate(self.depths) if d <= max(depth, 0)]
        place = {node: index for index, node in enumerate(kept)}
        return DraftTree(
            [self.tokens[node] for node in kept],
            [place.get(self.parents[node], -1) for node in kept],
            None if self.scores is None else [self.scores[node] for node in kept],
        )
