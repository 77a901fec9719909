"""The native walk against `rows.amax(-1)`, and the drafter's costs.

One torch thread. `ratio` is the median of one over the median of the other, taken in turn; the targets
are what the pipeline's tail can afford beside a forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from lattica._native import SuffixAutomaton
from lattica_infer.spec import DraftTree, walk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Row width, repetitions, temperatures."""
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeat", type=int, default=100)
    parser.add_argument(
        "--temperature", type=float, action="append", help="of the sampled walks; default 0.7, 1.0"
    )


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one result a case."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, args.vocabulary, generator=generator)
    yield _against_amax("greedy chain of 32", rows, args.repeat, target=1.2, temperature=0.0)
    yield _walk_of_8(rows, args.repeat)
    for temperature in args.temperature or [0.7, 1.0]:
        yield _against_amax(
            f"sampled chain of 32, T={temperature}", rows, args.repeat, target=3.5, temperature=temperature
        )
    tree = _accepted(rows, 0.0)
    amax, logprobs = _in_turn(
        args.repeat // 10,
        lambda: rows.amax(-1),
        lambda: walk(tree, rows, position=0, seed=1, logprobs=True),
    )
    yield {
        "bench": "greedy chain of 32 with log-probabilities",
        "milliseconds_a_token": logprobs * 1e3 / 32,
        "ratio": logprobs / amax,
    }
    yield from _drafter()


def _accepted(rows: torch.Tensor, temperature: float) -> DraftTree:
    """The chain that the target agrees with to its end."""
    tokens = [0]
    for position in range(len(rows) - 1):
        one = walk(
            DraftTree([0], [-1]),
            rows[position : position + 1],
            position=position,
            seed=1,
            temperature=temperature,
        )
        tokens += one.tokens
    return DraftTree.chain(tokens)


def _in_turn(repeat: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each, measured alternately so that they share the machine's moods."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(max(repeat, 3)):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def _against_amax(
    name: str, rows: torch.Tensor, repeat: int, *, target: float, temperature: float
) -> dict[str, Any]:
    tree = _accepted(rows, temperature)
    assert len(walk(tree, rows, position=0, seed=1, temperature=temperature).path) == len(rows) - 1
    amax, walked = _in_turn(
        repeat,
        lambda: rows.amax(-1),
        lambda: walk(tree, rows, position=0, seed=1, temperature=temperature),
    )
    return {
        "bench": name,
        "amax_ms": amax * 1e3,
        "walk_ms": walked * 1e3,
        "ratio": walked / amax,
        "target": target,
    }


def _walk_of_8(rows: torch.Tensor, repeat: int) -> dict[str, Any]:
    tree, eight = _accepted(rows, 0.0).head(8), rows[:8]
    amax, walked = _in_turn(repeat, lambda: eight.amax(-1), lambda: walk(tree, eight, position=0, seed=1))
    return {"bench": "greedy chain of 8", "amax_ms": amax * 1e3, "walk_ms": walked * 1e3, "target_ms": 0.15}


def _drafter() -> Iterator[dict[str, Any]]:
    """Text with repeats: a thousand random phrases out of fifty."""
    generator = torch.Generator().manual_seed(0)
    phrases = torch.randint(0, 2000, (50, 12), generator=generator)
    text = phrases[torch.randint(0, 50, (1000,), generator=generator)].flatten().tolist()
    for tokens in (500, 4000, 12_000):
        full = _automaton(text[:tokens])
        extended, drafted = _in_turn(20, partial(_automaton, text[:tokens]), partial(full.draft, 64))
        yield {
            "bench": f"suffix automaton of {tokens} tokens",
            "nanoseconds_a_token": extended / tokens * 1e9,
            "draft_of_64_ms": drafted * 1e3,
        }


def _automaton(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    return automaton
