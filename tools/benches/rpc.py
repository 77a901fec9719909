"""Calls per second, latencies and CPU a call, beside gRPC and the package lattica from PyPI.

Two processes on loopback for each contestant, one connection, 1, 16 and 64 callers that echo 128 B and 256 KiB.
Ours is encrypted, gRPC is not. Prints a JSON line for each work, contestant and figure (`calls`, `p50`, `p99`,
`cpu`: of both processes), then one for each ratio of ours to another's, with its target: `at_least` or `at_most`,
and `holds`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import _duel as duel
from _duel import Figure, Row, Target

CALLS = {  # what must hold, by work
    ("128 B", 64): (
        Target("pypi-lattica", at_least=3.0, goal=5.0),
        Target("grpc-aio", at_least=2.5, goal=4.0),
    ),
    ("256 KiB", 16): (
        Target("pypi-lattica", at_least=5.0),
        Target("grpc-aio", at_least=0.8, goal=1.0),
    ),
}
P50 = {("128 B", 1): (Target("pypi-lattica", at_most=1.0), Target("grpc-aio", goal=1.0))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, how often, who."""
    duel.add_arguments(parser, seconds=1.0, rounds=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every figure and ratio."""
    yield from duel.run("rpc", args, [row(*work) for work in works()])


def works() -> Iterator[tuple[str, int, int]]:
    for name, size in (("128 B", 128), ("256 KiB", 256 * 1024)):
        for callers in (1, 16, 64):
            yield name, size, callers


def row(name: str, size: int, callers: int) -> Row:
    """Calls of one size from some callers."""
    figures = [
        Figure("calls", "1/s", duel.rate, CALLS.get((name, callers), ())),
        Figure("cpu", "us/call", duel.cpu_per_piece),
    ]
    if callers == 1:
        figures += [
            Figure("p50", "us", lambda result: float(result["p50_us"]), P50.get((name, callers), ())),
            Figure("p99", "us", lambda result: float(result["p99_us"]), compared=False),
        ]
    plural = "s" if callers > 1 else ""
    job = {"work": "calls", "bytes": size, "callers": callers}
    return Row(f"{name}, {callers} caller{plural}", job, tuple(figures))
