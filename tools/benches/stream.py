"""MB/s of items and of raw streams, round trips on raw streams, and a small call beside a stream that saturates.

Two processes on loopback for each contestant. Items: a generator's, 4 KiB, 64 KiB and 1 MiB, read by one caller,
beside gRPC and the package lattica from PyPI. Raw streams of `net`, one connection: bulk from client to server and
128 B echoes, beside raw trio TCP (neither encrypted nor multiplexed; the yardstick) and stock py-libp2p. Beside: the
p99 of a 128 B call alone, and while a stream on the same connection takes all it can get, sending or receiving.
Prints a JSON line for each work, contestant and figure, then one for each ratio, with its target.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import _duel as duel
from _duel import Figure, Row, Target

BESIDE_AT_MOST = 10.0  # p99 beside a saturating stream over p99 alone
ITEMS = {"64 KiB": (Target("pypi-lattica", at_least=4.0), Target("grpc", goal=1.0))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, how often, who."""
    duel.add_arguments(parser, seconds=1.0, rounds=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every figure and ratio."""
    yield from duel.run("stream", args, list(rows()))


def rows() -> Iterator[Row]:
    """All works."""
    bytes_a_second = Figure("rate", "MB/s", duel.megabytes)
    cpu_a_byte = Figure("cpu", "ns/B", duel.cpu_per_byte)
    for name, size in (("4 KiB", 4096), ("64 KiB", 65536), ("1 MiB", 1 << 20)):
        rate = Figure("rate", "MB/s", duel.megabytes, ITEMS.get(name, ()))
        yield Row(f"items of {name}", {"work": "items", "bytes": size}, (rate, cpu_a_byte))
    bulk = Figure("rate", "MB/s", duel.megabytes, (Target("trio", at_least=0.25),))
    yield Row("bulk, one raw stream", {"work": "bulk"}, (bulk, cpu_a_byte))
    for callers in (1, 64):
        plural = "s" if callers > 1 else ""
        yield Row(
            f"128 B on {callers} raw stream{plural}",
            {"work": "echo", "bytes": 128, "callers": callers},
            (
                Figure("echoes", "1/s", duel.rate),
                Figure("cpu", "us/echo", duel.cpu_per_piece),
                Figure("p50", "us", lambda result: float(result["p50_us"])),
            ),
        )
    for direction in ("sending", "receiving"):
        yield Row(
            f"128 B call beside a stream, {direction}",
            {"work": f"beside_{direction}", "bytes": 128},
            (
                Figure("p99_alone", "us", lambda result: float(result["alone"]["p99_us"]), compared=False),
                Figure("p99_beside", "us", lambda result: float(result["p99_us"]), compared=False),
                Figure(
                    "p99_beside_over_alone",
                    "1",
                    lambda result: float(result["p99_us"] / result["alone"]["p99_us"]),
                    at_most=BESIDE_AT_MOST,
                    compared=False,
                ),
                Figure("rate", "MB/s", lambda result: bytes_a_second.value(result["bulk"])),
            ),
        )
