"""How much to draft: as many nodes as pay for themselves at what a round costs here and now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lattica_infer.spec.tree import MAX_NODES, DraftTree

__all__ = ["Budget"]

STEP: Final = 8  # nodes the cap moves a round: a bush of 64 is reached in a few rounds, a mistake costs one
PROBE_NODES: Final = 4  # drafted now and then when drafting does not pay, to notice when it would
PROBE_EVERY: Final = 16  # rounds between two probes
DECAY: Final = 0.96  # weight of an observation per round: about the last 25 count
PRIOR_SPREAD: Final = 64.0  # nodes squared: the first slope counts like one round eight nodes off the mean
PRIOR_NODES: Final = 4.0  # predicted acceptances that "the drafter's scores are right" is worth at first
WORST_OUTLIER: Final = 4.0  # times the expected seconds; longer rounds were a hiccup and count as this long
LEAST_SECONDS: Final = 1e-6  # no round is faster; a virtual clock may say 0
UNSCORED_ACCEPTANCE: Final = 0.6  # probability of one more token, for drafters without an opinion


class Budget:
    """Decides how many nodes of a draft tree to send. Reads no clock: seconds are told.

    A round of n drafted nodes is taken to cost `fixed + n * slope` seconds; both are fitted to the rounds
    seen (least squares with decay). Nodes are added best first while the next one's probability exceeds what
    its cost could earn elsewhere: `P > slope * (1 + sum P) / (fixed + n * slope)`, which makes the expected
    tokens a second of the round greatest. So a longer round trip grows the tree, and where nothing pays
    nothing is drafted. Probabilities are the drafter's scores times how right they were so far.

    Args:
        round_trip_seconds: a guess of the links' share of a round.
        stage_seconds: a guess of the model's share of a round, all stages, one token.
        node_seconds: a guess of the cost of one more token in a pass; by default the measured 1/16 of
            `stage_seconds` (fp32 on a CPU; LOG).
        max_nodes: never more drafted nodes than this.

    Source: best-first trees by path probability (OPT-Tree, arXiv 2406.17276), as large as makes tokens a second
    greatest (goodput, SmartSpec, arXiv 2406.14066). Costs may be told in any unit, as long as it is one.
    """

    def __init__(
        self,
        *,
        round_trip_seconds: float = 0.0,
        stage_seconds: float = 0.022,
        node_seconds: float | None = None,
        max_nodes: int = 64,
    ) -> None:
        if not (round_trip_seconds >= 0.0 and stage_seconds > 0.0 and 0 <= max_nodes < MAX_NODES):
            raise ValueError("seconds are positive, and max_nodes leaves room for node 0 of a tree")
        self.max_nodes = max_nodes
        self.fixed_seconds = round_trip_seconds + stage_seconds
        self.node_seconds = stage_seconds / 16 if node_seconds is None else node_seconds
        self._first_slope = self.node_seconds
        # Decayed sums of 1, n, n*n, t and n*t over rounds of n drafted nodes and t seconds.
        self._sums = [0.0] * 5
        self._predicted = self._accepted = PRIOR_NODES
        self._cap = min(max_nodes, 2 * STEP)
        self._wanted = self._cap
        self._expected = 0.0  # acceptances that the round under way promised, before calibration
        self._idle = 0  # rounds since anything was drafted

    @property
    def calibration(self) -> float:
        """How many tokens were accepted for each that the scores promised."""
        return self._accepted / self._predicted

    def next(self) -> int:
        """Nodes to ask of the drafter for the next round, besides node 0."""
        return self._cap

    def keep(self, tree: DraftTree) -> DraftTree:
        """The part of `tree`, which is best first, that pays; at least node 0."""
        scores = tree.scores if tree.scores is not None else [UNSCORED_ACCEPTANCE**d for d in tree.depths]
        nodes = self._paying(scores[1 : 1 + self._cap])
        # The cap follows what the rule would take, a few nodes a round.
        self._wanted = self._cap + STEP if nodes >= self._cap else nodes
        if nodes == 0 and len(tree) > 1:
            self._idle += 1
            if self._idle >= PROBE_EVERY:
                nodes = min(PROBE_NODES, len(tree) - 1, self.max_nodes)
        if nodes > 0:
            self._idle = 0
        self._expected = sum(scores[1 : 1 + nodes])
        return tree.head(1 + nodes)

    def _paying(self, scores: Sequence[float]) -> int:
        calibration = self.calibration
        gained, cost = 1.0, self.fixed_seconds
        for nodes, score in enumerate(scores):
            probability = min(1.0, calibration * score)
            if probability * cost <= self.node_seconds * gained:
                return nodes
            gained += probability
            cost += self.node_seconds
        return len(scores)

    def observe(self, *, nodes: int, accepted: int, seconds: float) -> None:
        """Learn from a finished round: drafted nodes sent, how many were accepted, what it took."""
        expected_seconds = self.fixed_seconds + nodes * self.node_seconds
        seconds = max(LEAST_SECONDS, min(seconds, WORST_OUTLIER * expected_seconds))
        sample = (1.0, float(nodes), float(nodes * nodes), seconds, nodes * seconds)
        self._sums = [DECAY * total + new for total, new in zip(self._sums, sample, strict=True)]
        self._fit()
        # The prior wears off like everything else, but the drafter's word never counts for nothing.
        self._predicted = DECAY * self._predicted + self._expected + (1 - DECAY)
        self._accepted = DECAY * self._accepted + accepted + (1 - DECAY)
        self._expected = 0.0
        move = max(-STEP, min(STEP, self._wanted - self._cap))
        self._cap = max(min(PROBE_NODES, self.max_nodes), min(self.max_nodes, self._cap + move))

    def _fit(self) -> None:
        """Least squares over the decayed rounds, the slope drawn towards its first guess.

        Rounds of one width say nothing of the slope: then the guess stands, and `fixed` takes the rest.
        """
        weight, n, nn, t, nt = self._sums
        spread = nn - n * n / weight
        slope = nt - n * t / weight + PRIOR_SPREAD * self._first_slope
        # A free node or a negative cost is noise; a thousandth of a round keeps the rule finite.
        least = 1e-3 * t / weight
        self.node_seconds = max(slope / (spread + PRIOR_SPREAD), least)
        self.fixed_seconds = max((t - self.node_seconds * n) / weight, least)
