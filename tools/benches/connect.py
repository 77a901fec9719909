"""From TCP to the first reply: dial a peer that runs, call it once, hang up; the median of many.

Two processes on loopback for each contestant: ours and stock py-libp2p (TCP, Noise, Yamux; their first reply is a
call's and a raw stream's), gRPC with a channel of its own each time, and raw trio TCP. The package lattica from PyPI
is left out: it dials only while it starts. Prints a JSON line for each contestant and figure, then the ratios; ours
has a target in milliseconds, `at_most`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import _duel as duel
from _duel import Figure, Row

AT_MOST_MS = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--count", type=int, default=20, help="dials in a round [20]")
    duel.add_arguments(parser, seconds=0.0, rounds=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the medians, in milliseconds."""
    row = Row(
        "TCP to first reply",
        {"work": "connect", "count": args.count},
        (
            Figure("p50", "ms", lambda result: float(result["p50_us"] / 1e3), at_most=AT_MOST_MS),
            Figure("p99", "ms", lambda result: float(result["p99_us"] / 1e3), compared=False),
            Figure("cpu", "ms", lambda result: duel.cpu_per_piece(result) / 1e3),
        ),
    )
    yield from duel.run("connect", args, [row])
