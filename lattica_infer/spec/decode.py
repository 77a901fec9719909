"""The decode loop without I/O: prompt ids in, rounds out, verdicts in, tokens out.

What every round keeps true, on the coordinator and on each stage: the KV cache holds `base` committed rows,
for the text up to but without the last committed token; node 0 of the round is that token; its position is
`base`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica_infer.errors import CacheFullError
from lattica_infer.spec.budget import Budget
from lattica_infer.spec.drafters import Drafter
from lattica_infer.spec.tree import MAX_NODES, DraftTree
from lattica_infer.spec.verify import Verdict

__all__ = ["DecodeStats", "Decoder", "Emitted", "Round"]

PREFILL_CHUNK: Final = (
    256  # tokens a prefill frame; larger ones gain nothing on a CPU and delay other sessions
)


@dataclass(frozen=True, slots=True)
class Round:
    """One frame down the pipeline.

    epoch: of the route; raised when a stage is replaced. Stages drop frames of older epochs.
    window: number of this frame within its epoch, from 0; a verdict names the window that it answers.
    base: committed cache rows once `commit` has been applied; also the position of node 0.
    commit: which rows of the frame before become committed, in this order; its other rows are dropped.
    tokens, parents: a draft tree (or a chain of the prompt): `parents[0]` is -1, parents come first.
    want: "walk" asks the last stage for a verdict on the tree; "none" only fills caches (prefill).
    """

    epoch: int
    window: int
    base: int
    commit: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    want: Literal["none", "walk"]


@dataclass(frozen=True, slots=True)
class Emitted:
    """A generated token: its id, and its natural log-probability where the verdict carried one."""

    id: int
    logprob: float | None


@dataclass(slots=True)
class DecodeStats:
    """Counts of one generation.

    `accepted` are draft tokens that the target agreed with, without bonus ones.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0


class Decoder:
    """Runs one generation: `prefill()` once, then `next_round()` and `on_verdict()` in turn until `finish` is
    set.

    Prefill rounds need no verdict and may all be sent ahead of the first drafted round. The first sampled
    token comes from the row of the last prompt token, which is node 0 of the first round, drafts below it
    included.

    Args:
        prompt: token ids, at least one.
        drafter: begun here; it sees the prompt and the output, nothing else.
        budget: how many nodes to draft; one per generation.
        max_tokens: at most so many tokens are emitted, whatever a verdict accepted.
        end_ids: the first of these ends the generation and is not emitted.
        rows: cache rows that every stage grants; prompt and output share them with the nodes of a round.
        vocabulary: token ids are below it.

    Raises:
        ValueError: an empty prompt, or an id outside the vocabulary.
        CacheFullError: the prompt alone does not fit into `rows`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        drafter: Drafter,
        budget: Budget,
        max_tokens: int,
        end_ids: Collection[int],
        rows: int,
        vocabulary: int,
        epoch: int = 0,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty; generation needs at least one token to start from")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(
                f"the prompt holds ids {min(prompt)}..{max(prompt)}, the vocabulary has {vocabulary}"
            )
        if len(prompt) > rows:
            raise CacheFullError(f"the prompt has {len(prompt)} tokens and the cache {rows} rows; shorten it")
        self.finish: Literal["end", "length"] | None = "length" if max_tokens < 1 else None
        self.stats = DecodeStats()
        self._prompt = tuple(prompt)
        self._drafter, self._budget = drafter, budget
        self._max_tokens, self._rows, self._vocabulary = max_tokens, rows, vocabulary
        self._end_ids = frozenset(end_ids)
        self._epoch, self._chunk, self._window = epoch, chunk, 0
        self._base = 0  # rows committed once the next frame's commit is applied
        self._commit: tuple[int, ...] = ()
        self._prefilled = False
        self._tree: DraftTree | None = None  # of the round that waits for its verdict

    def prefill(self) -> Iterator[Round]:
        """Frames that fill the caches with the prompt but its last token, in order; none for one token."""
        if self._prefilled:
            raise LocalProtocolError("prefill() runs once, before the first round")
        self._prefilled = True
        self._drafter.begin(self._prompt)
        last = len(self._prompt) - 1
        chunks = [self._prompt[at : min(at + self._chunk, last)] for at in range(0, last, self._chunk)]
        frames = [self._frame(DraftTree.chain(chunk), "none", range(len(chunk))) for chunk in chunks]
        return iter(frames)

    def next_round(self) -> Round | None:
        """The next round to send, or None when the generation is finished."""
        if not self._prefilled or self._tree is not None:
            raise LocalProtocolError("a round starts after prefill() and after the verdict on the one before")
        if self.finish is None and self._base >= self._rows:
            self.finish = "length"  # no row left for node 0
        if self.finish is not None:
            return None
        room = min(self._rows - self._base, MAX_NODES) - 1
        depth = self._max_tokens - self.stats.tokens - 1  # deeper nodes could never be emitted
        nodes = min(self._budget.next(), room) if depth > 0 else 0
        tree = self._budget.keep(self._drafter.draft(nodes).head(1 + nodes).shallow(depth))
        self._tree = tree
        return self._frame(tree, "walk", ())

    def _frame(self, tree: DraftTree, want: Literal["none", "walk"], commit_next: Sequence[int]) -> Round:
        frame = Round(
            epoch=self._epoch,
            window=self._window,
            base=self._base,
            commit=self._commit,
            tokens=tuple(tree.tokens),
            parents=tuple(tree.parents),
            want=want,
        )
        self._window += 1
        self._commit = tuple(commit_next)
        self._base += len(self._commit)
        return frame

    def on_verdict(self, verdict: Verdict, *, seconds: float) -> list[Emitted]:
        """Take the verdict on the round under way; gives the tokens that it adds to the output, perhaps none.

        `seconds`: from the round's sending to the verdict's arrival, for the budget.

        Raises:
            RemoteProtocolError: the verdict is none that a walk over this tree can give.
        """
        tree = self._tree
        if tree is None:
            raise LocalProtocolError("no round waits for a verdict")
        self._check(tree, verdict)
        self._tree = None
        self._commit = (0, *verdict.path)
        self._base += len(self._commit)
        self.stats.rounds += 1
        self.stats.drafted += len(tree) - 1
        self._budget.observe(nodes=len(tree) - 1, accepted=len(verdict.path), seconds=seconds)
        emitted: list[Emitted] = []
        for index, token in enumerate(verdict.tokens):
            if token in self._end_ids:
                self.finish = "end"
                break
            emitted.append(Emitted(token, verdict.logprobs[index] if verdict.logprobs else None))
            if self.stats.tokens + len(emitted) == self._max_tokens:
                self.finish = "length"
                break
        self.stats.tokens += len(emitted)
        self.stats.accepted += min(len(verdict.path), len(emitted))
        if self.finish is None:
            self._drafter.extend(verdict.tokens)
        return emitted

    def _check(self, tree: DraftTree, verdict: Verdict) -> None:
        """Hold a verdict from a peer against the tree that it is about."""
        tokens, path, logprobs = verdict.tokens, verdict.path, verdict.logprobs
        if len(tokens) != len(path) + 1 or len(path) >= len(tree):
            raise RemoteProtocolError(
                f"a verdict of {len(tokens)} tokens over a path of {len(path)} nodes cannot follow a tree of "
                f"{len(tree)} nodes"
            )
        if logprobs and (len(logprobs) != len(tokens) or any(math.isnan(p) or p > 1e-3 for p in logprobs)):
            raise RemoteProtocolError("a verdict's log-probabilities are one a token, and none is above 0")
        node = 0
        for step, child in enumerate(path):
            if not 0 < child < len(tree) or tree.parents[child] != node or tree.tokens[child] != tokens[step]:
                raise RemoteProtocolError(
                    f"a verdict's path goes from node {node} to {child}, which its tokens do not"
                )
            node = child
        last = tokens[-1]
        if not 0 <= last < self._vocabulary:
            raise RemoteProtocolError(f"a verdict emits token {last}, the vocabulary has {self._vocabulary}")
        if any(tree.parents[child] == node and tree.tokens[child] == last for child in range(1, len(tree))):
            raise RemoteProtocolError(
                f"a verdict stops at node {node}, whose child carries the token it emits"
            )
