"""The walk's law: what it emits is distributed exactly as the target says, whatever the tree.

Each check takes the walk as an argument, and is run on planted mistakes too: a check that passes them checks
nothing.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache

import numpy as np
import pytest

from lattica import _native
from lattica_infer.spec import DraftTree, walk
from lattica_infer.spec.verify import walk_with

VOCABULARY = 3
Draw = Callable[[int], int]
WalkWith = Callable[[DraftTree, Draw], tuple[list[int], list[int]]]


@cache
def target(prefix: tuple[int, ...]) -> tuple[float, ...]:
    """A made-up model: the distribution of the next token after `prefix`."""
    weights = [random.Random(f"{prefix} {token}").expovariate(1.0) for token in range(VOCABULARY)]
    return tuple(weight / sum(weights) for weight in weights)


def context(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The drafted tokens on the way to `node`, without node 0's."""
    return () if node == 0 else (*context(tree, tree.parents[node]), tree.tokens[node])


def small_trees(nodes: int) -> Iterator[DraftTree]:
    for size in range(1, nodes + 1):
        for parents in itertools.product(*[range(node) for node in range(1, size)]):
            for tokens in itertools.product(range(VOCABULARY), repeat=size - 1):
                yield DraftTree([0, *tokens], [-1, *parents])


class _Undecided(Exception):
    """The walk asked for a draw that the script does not have yet."""


def outcomes(walk_: WalkWith, tree: DraftTree) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every way that the target's draws can fall: what the walk emits then, and with which probability."""
    scripts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while scripts:
        script, probability = scripts.pop()
        left = iter(script)
        asked: list[int] = []

        def draw(node: int, left: Iterator[int] = left, asked: list[int] = asked) -> int:
            asked.append(node)
            for token in left:
                return token
            raise _Undecided

        try:
            tokens, _ = walk_(tree, draw)
        except _Undecided:
            chances = target(context(tree, asked[-1]))
            scripts += [((*script, token), probability * chances[token]) for token in range(VOCABULARY)]
        else:
            yield tuple(tokens), probability


def total_variation(walk_: WalkWith, tree: DraftTree) -> float:
    """Between the walk's output, continued by plain sampling to one length, and the target's own text."""
    length = max(tree.depths) + 1
    law: Counter[tuple[int, ...]] = Counter()
    for tokens, probability in outcomes(walk_, tree):
        for rest in itertools.product(range(VOCABULARY), repeat=length - len(tokens)):
            text = (*tokens, *rest)
            law[text] += probability * math.prod(
                target(text[:at])[text[at]] for at in range(len(tokens), length)
            )
    texts = itertools.product(range(VOCABULARY), repeat=length)
    return 0.5 * sum(abs(law[t] - math.prod(target(t[:at])[t[at]] for at in range(length))) for t in texts)


def worst_total_variation(walk_: WalkWith) -> float:
    return max(total_variation(walk_, tree) for tree in small_trees(4))


def walk_on_at_a_sibling(tree: DraftTree, draw: Draw) -> tuple[list[int], list[int]]:
    """Planted: accepts the right token, but goes on below the last child instead of the one that carries it."""
    tokens, path, node = [draw(0)], [], 0
    while any(tree.tokens[child] == tokens[-1] for child in tree.children[node]):
        node = tree.children[node][-1]
        path.append(node)
        tokens.append(draw(node))
    return tokens, path


def walk_with_one_draw(tree: DraftTree, draw: Draw) -> tuple[list[int], list[int]]:
    """Planted: the first position's noise serves all (the same token again, where rows are alike)."""
    first = draw(0)
    return walk_with(tree, lambda node: first)


def walk_that_takes_the_draft(tree: DraftTree, draw: Draw) -> tuple[list[int], list[int]]:
    """Planted: a first child is accepted although the target said something else."""
    tokens, path = walk_with(tree, draw)
    first = tree.children[0][:1]
    return ([tree.tokens[first[0]], *tokens], first) if first and not path else (tokens, path)


def test_every_small_tree_gives_exactly_the_targets_law() -> None:
    assert worst_total_variation(walk_with) < 1e-12


@pytest.mark.parametrize("mutant", [walk_on_at_a_sibling, walk_with_one_draw, walk_that_takes_the_draft])
def test_the_exact_check_finds_planted_mistakes(mutant: WalkWith) -> None:
    assert worst_total_variation(mutant) > 1e-3


# The same for the native walk, whose noise cannot be enumerated: chi-square over many seeds.

SAMPLES = 6000
Sampler = Callable[[int], tuple[int, ...]]  # seed -> three tokens
TEMPERATURE = 0.7
TREE = DraftTree([0, 1, 2, 0, 1, 0], [-1, 0, 0, 1, 1, 2])  # up to two accepted tokens, then one more


@lru_cache
def logits(prefix: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(math.log(p) * TEMPERATURE for p in target(prefix))


@cache
def rows(tree: DraftTree) -> np.ndarray:
    return np.array([logits(context(tree, node)) for node in range(len(tree))], dtype=np.float32)


def chi_square(sampler: Sampler, length: int) -> tuple[float, float]:
    """The statistic of the first `length` tokens against the target, and what it exceeds once in a million times."""
    counts = Counter(sampler(seed)[:length] for seed in range(SAMPLES))
    texts = list(itertools.product(range(VOCABULARY), repeat=length))
    expected = [SAMPLES * math.prod(target(t[:at])[t[at]] for at in range(length)) for t in texts]
    statistic = sum((counts[t] - e) ** 2 / e for t, e in zip(texts, expected, strict=True))
    degrees = len(texts) - 1
    spread = 2 / (9 * degrees)
    return statistic, degrees * (1 - spread + 4.75 * math.sqrt(spread)) ** 3  # Wilson and Hilferty (1931)


def speculative(seed: int) -> tuple[int, ...]:
    """Walks over TREE; positions go on where the last walk stopped."""
    text: tuple[int, ...] = ()
    while len(text) < 3:
        tree = TREE if not text else DraftTree([text[-1]], [-1])
        table = rows(TREE) if not text else np.array([logits(text)], dtype=np.float32)
        verdict = walk(tree, table, position=len(text), seed=seed, temperature=TEMPERATURE)
        text += tuple(verdict.tokens)
    return text


def _plain(
    seed: int, score: Callable[[float, float], float], position: Callable[[int], int]
) -> tuple[int, ...]:
    text: tuple[int, ...] = ()
    for at in range(3):
        noise = [_native.gumbel(seed, position(at), token) for token in range(VOCABULARY)]
        scores = [score(z, g) for z, g in zip(logits(text), noise, strict=True)]
        text += (scores.index(max(scores)),)
    return text


def plain(seed: int) -> tuple[int, ...]:
    return _plain(seed, lambda z, g: z / TEMPERATURE + g, lambda at: at + 1)


def with_noise_reused(seed: int) -> tuple[int, ...]:
    return _plain(seed, lambda z, g: z / TEMPERATURE + g, lambda at: 1)


def with_warp_after_noise(seed: int) -> tuple[int, ...]:
    return _plain(seed, lambda z, g: (z + g) / TEMPERATURE, lambda at: at + 1)


def at_a_sibling(seed: int) -> tuple[int, ...]:
    def draw(node: int) -> int:
        table = rows(TREE)[node : node + 1]
        one = DraftTree([0], [-1])
        position = TREE.depths[node]
        return walk(one, table, position=position, seed=seed, temperature=TEMPERATURE).tokens[0]

    text = tuple(walk_on_at_a_sibling(TREE, draw)[0])
    return (*text, *plain(seed)[len(text) :])[:3]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_seeded_text_has_the_targets_joint_law(length: int) -> None:
    statistic, limit = chi_square(speculative, length)
    assert statistic < limit


@pytest.mark.parametrize("mutant", [with_noise_reused, with_warp_after_noise, at_a_sibling])
def test_the_joint_check_finds_planted_mistakes(mutant: Sampler) -> None:
    statistic, limit = chi_square(mutant, 3)
    assert statistic > limit


def test_the_walk_says_what_plain_sampling_says_seed_by_seed() -> None:
    for seed in range(300):
        assert speculative(seed)[:3] == plain(seed)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.8), (4, 0.8)])
def test_one_step_has_the_warped_law(top_k: int, top_p: float) -> None:
    weights = np.array([0.3, 0.05, 0.25, 0.1, 0.2, 0.1])
    order = np.argsort(-weights, kind="stable")
    kept = order[: top_k or len(order)]
    sums = np.cumsum(weights[kept]) / weights[kept].sum()
    kept = kept[: 1 + int(np.argmax(sums >= top_p))] if top_p < 1 else kept
    law = {int(token): weights[token] / weights[kept].sum() for token in kept}
    table = (np.log(weights)[None] * 1.3).astype(np.float32)
    tree = DraftTree([0], [-1])
    draws = Counter(
        walk(tree, table, position=9, seed=seed, temperature=1.3, top_k=top_k, top_p=top_p).tokens[0]
        for seed in range(SAMPLES)
    )
    assert set(draws) == set(law)
    statistic = sum((draws[token] - SAMPLES * p) ** 2 / (SAMPLES * p) for token, p in law.items())
    assert statistic < 40.0  # five degrees of freedom or fewer: less than once in a million


def _ks(values: Sequence[float]) -> float:
    """Kolmogorov's distance to the standard Gumbel law, times the root of the sample's size."""
    ordered = sorted(values)
    law = [math.exp(-math.exp(-value)) for value in ordered]
    size = len(law)
    return math.sqrt(size) * max(max(p - i / size, (i + 1) / size - p) for i, p in enumerate(law))


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_noise_is_standard_gumbel_along_every_axis(axis: str) -> None:
    point = {"seed": 11, "position": 5, "token": 17}
    values = [_native.gumbel(**{**point, axis: index}) for index in range(20_000)]
    assert _ks(values) < 2.7  # exceeded once in a million times
    # Neighbours share a block or a counter: their noise must not show it.
    centred = np.array(values) - np.mean(values)
    for lag in (1, 2, 8, 16, 128, 1024):
        correlation = float((centred[lag:] * centred[:-lag]).mean() / centred.var())
        assert abs(correlation) < 5 / math.sqrt(len(values))
