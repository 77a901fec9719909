from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica_infer.errors import CacheFullError
from lattica_infer.spec import DraftTree, Verdict, walk
from lattica_infer.spec.budget import Budget
from lattica_infer.spec.decode import Decoder, Round
from lattica_infer.spec.drafters import Drafter, make_drafter

VOCABULARY = 12


def logits(text: Sequence[int]) -> np.ndarray:
    """A made-up model in doubles: the last three tokens decide, so that texts repeat themselves."""
    seed = [*text[-3:], len(text) % 2]
    return np.random.default_rng(seed).normal(size=VOCABULARY) * 2.5


class RandomDrafter:
    """Proposes random trees, duplicates among siblings included."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._last = 0

    def begin(self, prompt: Sequence[int]) -> None:
        self._last = prompt[-1]

    def extend(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1]

    def draft(self, budget: int) -> DraftTree:
        nodes = self._random.randint(0, budget)
        parents = [-1] + [self._random.randrange(node) for node in range(1, nodes + 1)]
        return DraftTree([self._last, *self._random.choices(range(VOCABULARY), k=nodes)], parents)


class Pipeline:
    """A pipeline of one stage, whose cache rows are the tokens themselves: it checks what every stage relies on."""

    def __init__(self, *, rows: int, seed: int, temperature: float, backend: str = "native") -> None:
        self.committed: list[int] = []
        self._scratch: tuple[int, ...] = ()
        self._rows, self._windows = rows, 0
        self._settings = {"seed": seed, "temperature": temperature, "backend": backend}

    def send(self, frame: Round) -> Verdict | None:
        assert (frame.epoch, frame.window) == (0, self._windows)
        self._windows += 1
        self.committed += [self._scratch[row] for row in frame.commit]
        assert frame.base == len(self.committed)
        assert frame.base + len(frame.tokens) <= self._rows
        self._scratch = frame.tokens
        if frame.want == "none":
            return None
        tree = DraftTree(frame.tokens, frame.parents)
        table = np.array([logits(self.committed + self._path(tree, n)) for n in range(len(tree))])
        # type: ignore[arg-type]
        return walk(tree, table.astype(np.float32), position=frame.base, **self._settings)

    def _path(self, tree: DraftTree, node: int) -> list[int]:
        return [] if node < 0 else [*self._path(tree, tree.parents[node]), tree.tokens[node]]


def decoder(prompt: Sequence[int], drafter: Drafter, **options: object) -> Decoder:
    usual = {"max_tokens": 40, "end_ids": (), "rows": 500, "vocabulary": VOCABULARY, "chunk": 4}
    # type: ignore[arg-type]
    return Decoder(prompt, drafter=drafter, budget=Budget(max_nodes=20), **{**usual, **options})


def generate(decoding: Decoder, pipeline: Pipeline) -> list[int]:
    for frame in decoding.prefill():
        assert pipeline.send(frame) is None
    out: list[int] = []
    while (frame := decoding.next_round()) is not None:
        verdict = pipeline.send(frame)
        assert verdict is not None
        out += [token.id for token in decoding.on_verdict(verdict, seconds=0.02)]
    return out


def plain(prompt: list[int], tokens: int, *, seed: int, temperature: float) -> list[int]:
    """The target alone, token by token."""
    text = list(prompt)
    for _ in range(tokens):
        row = logits(text).astype(np.float32)[None]
        one = DraftTree([0], [-1])
        text += walk(one, row, position=len(text) - 1, seed=seed, temperature=temperature).tokens
    return text[len(prompt) :]


@settings(max_examples=30)
@given(
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    backend=st.sampled_from(["native", "torch"]),
)
def test_every_drafter_and_none_give_the_same_text(
    prompt: list[int], seed: int, temperature: float, backend: str
) -> None:
    want = plain(prompt, 40, seed=seed, temperature=temperature)
    drafters = [make_drafter("none"), make_drafter("suffix"), RandomDrafter(1), RandomDrafter(2)]
    for drafter in drafters:
        pipeline = Pipeline(rows=500, seed=seed, temperature=temperature, backend=backend)
        assert generate(decoder(prompt, drafter), pipeline) == want, drafter.name


def test_accepted_drafts_save_rounds_and_are_counted() -> None:
    prompt = [1, 2, 3]
    runs = {name: decoder(prompt, make_drafter(name), max_tokens=200) for name in ("none", "suffix")}
    for decoding in runs.values():
        generate(decoding, Pipeline(rows=500, seed=0, temperature=0.0))
        stats = decoding.stats
        assert stats.tokens == 200
        # Each round adds its accepted tokens and one more; the last may be cut.
        assert stats.tokens <= stats.accepted + stats.rounds
        assert stats.tokens_per_round == stats.tokens / stats.rounds
    assert runs["none"].stats.rounds == 200
    assert runs["none"].stats.drafted == 0
    assert runs["suffix"].stats.rounds < 150


@given(st.integers(0, 40), st.integers(0, 9))
def test_never_more_than_max_tokens(max_tokens: int, seed: int) -> None:
    decoding = decoder([5], RandomDrafter(seed), max_tokens=max_tokens)
    out = generate(decoding, Pipeline(rows=500, seed=seed, temperature=0.0))
    assert len(out) == decoding.stats.tokens == max_tokens
    assert decoding.finish == "length"


@given(
    st.integers(0, 200),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=3),
    st.sampled_from(["none", "suffix"]),
)
def test_the_first_end_token_ends_the_text_unseen(seed: int, end_ids: set[int], name: str) -> None:
    want = plain([3, 4], 40, seed=seed, temperature=1.0)
    end = next((at for at, token in enumerate(want) if token in end_ids), None)
    decoding = decoder([3, 4], make_drafter(name), end_ids=end_ids)
    assert generate(decoding, Pipeline(rows=500, seed=seed, temperature=1.0)) == want[:end]
    assert decoding.finish == ("length" if end is None else "end")


@given(st.integers(5, 30), st.integers(0, 5))
def test_a_full_cache_ends_the_text(rows: int, seed: int) -> None:
    decoding = decoder([1] * 5, RandomDrafter(seed), rows=rows, max_tokens=1000)
    out = generate(decoding, Pipeline(rows=rows, seed=0, temperature=0.0))  # which refuses a frame too long
    assert len(out) == rows - 5 + 1  # the last token needs no row
    assert decoding.finish == "length"


def test_prefill_covers_the_prompt_but_its_last_token() -> None:
    frames = list(decoder(list(range(10)), make_drafter("none")).prefill())
    assert [frame.tokens for frame in frames] == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert [frame.commit for frame in frames] == [(), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert [frame.base for frame in frames] == [0, 4, 8]
    assert {frame.want for frame in frames} == {"none"}
    assert list(decoder([7], make_drafter("none")).prefill()) == []


def test_log_probabilities_go_with_their_tokens() -> None:
    decoding = decoder([1], make_drafter("none"))
    list(decoding.prefill())
    decoding.next_round()
    assert [(t.id, t.logprob) for t in decoding.on_verdict(Verdict([3], [], [-0.5]), seconds=0.1)] == [
        (3, -0.5)
    ]
    decoding.next_round()
    assert [(t.id, t.logprob) for t in decoding.on_verdict(Verdict([4], []), seconds=0.1)] == [(4, None)]


class FixedDrafter(RandomDrafter):
    def draft(self, budget: int) -> DraftTree:
        return DraftTree([self._last, 3, 5, 4], [-1, 0, 0, 1], [1.0, 0.9, 0.9, 0.9])


def _waiting() -> Decoder:
    """Waits for a verdict on a tree: 1 -> (3 -> 4, 5)."""
    decoding = decoder([1], FixedDrafter(0))
    list(decoding.prefill())
    frame = decoding.next_round()
    assert frame is not None
    assert frame.tokens == (1, 3, 5, 4)
    return decoding


@pytest.mark.parametrize(
    ("tokens", "path", "logprobs"),
    [
        ([], [], []),
        ([3], [1], []),  # one token short
        ([3, 4], [], []),
        ([9, 4], [1], []),  # node 1 carries 3
        ([3, 9], [0], []),
        ([3, 9], [-3], []),
        ([3, 9], [4], []),
        ([4, 9], [3], []),  # node 3 is no child of node 0
        ([3, 5, 9], [1, 2], []),  # nor node 2 of node 1
        ([3], [], []),  # a walk would have gone on to node 1
        ([3, 4], [1], []),
        ([VOCABULARY], [], []),
        ([-1], [], []),
        ([7], [], [-0.5, -0.5]),
        ([7], [], [float("nan")]),
        ([7], [], [0.5]),
        ([3] * 9, [1] * 8, []),
    ],
)
def test_a_verdict_that_no_walk_can_give_is_refused(
    tokens: list[int], path: list[int], logprobs: list[float]
) -> None:
    with pytest.raises(RemoteProtocolError):
        _waiting().on_verdict(Verdict(tokens, path, logprobs), seconds=0.1)


@given(
    st.lists(st.integers(-1, VOCABULARY), max_size=5),
    st.lists(st.integers(-2, 5), max_size=5),
    st.lists(st.floats(width=32), max_size=5),
)
def test_garbage_is_refused_or_is_a_walk(tokens: list[int], path: list[int], logprobs: list[float]) -> None:
    decoding = _waiting()
    try:
        decoding.on_verdict(Verdict(tokens, path, logprobs), seconds=0.1)
    except RemoteProtocolError:
        return
    assert path in ([], [1], [2], [1, 3])
    frame = decoding.next_round()
    assert frame is not None
    assert frame.commit == (0, *path)


def _twice_prefill(decoding: Decoder) -> None:
    list(decoding.prefill())
    list(decoding.prefill())


def _round_before_prefill(decoding: Decoder) -> None:
    decoding.next_round()


def _two_rounds_at_once(decoding: Decoder) -> None:
    list(decoding.prefill())
    decoding.next_round()
    decoding.next_round()


def _verdict_on_nothing(decoding: Decoder) -> None:
    list(decoding.prefill())
    decoding.on_verdict(Verdict([1], []), seconds=0.1)


@pytest.mark.parametrize(
    "misuse", [_twice_prefill, _round_before_prefill, _two_rounds_at_once, _verdict_on_nothing]
)
def test_steps_out_of_order_are_the_callers_bug(misuse: Callable[[Decoder], None]) -> None:
    with pytest.raises(LocalProtocolError):
        misuse(decoder([1, 2], make_drafter("none")))


def test_prompts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        decoder([], make_drafter("none"))
    with pytest.raises(ValueError, match="the vocabulary has 12"):
        decoder([12], make_drafter("none"))
    with pytest.raises(CacheFullError, match="9 tokens and the cache 8 rows"):
        decoder([1] * 9, make_drafter("none"), rows=8)
