"""One stream over a long fat link: 100 ms round trip, 200 Mbit/s, beside raw TCP over the same link. Needs root.

Two processes for each contestant, in two namespaces that tools/delayed_link.py joins; `--rtt-ms`, `--mbit` and
`--loss` change the link. Ours, raw trio TCP and stock py-libp2p in turn: MB/s of one stream from its start on, the
median round trip of an echo, and the time from TCP to the first reply. Socket buffers, congestion control and all else
of TCP are as the system has them: what they are is in the first line. Prints a JSON line for each contestant and
figure, then the ratios, with a target of 0.8 for MB/s beside raw TCP.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _duel as duel
from _duel import Figure, Row, Target
from delayed_link import ADDRESSES, DelayedLink  # tools/delayed_link.py

AT_LEAST = 0.8  # of raw TCP's MB/s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The link, how long, how often, who."""
    parser.add_argument("--rtt-ms", type=float, default=100.0)
    parser.add_argument("--mbit", type=float, default=200.0)
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets lost each way [0]")
    duel.add_arguments(parser, seconds=8.0, rounds=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every figure and ratio."""
    contestants = {name: one for name, one in duel.chosen(args).items() if "bulk" in one.works}
    link = DelayedLink(rtt=args.rtt_ms / 1e3, rate=args.mbit * 1e6 / 8, loss=args.loss)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(link)
        except OSError as error:
            raise SystemExit(f"no delayed link: {error}") from error
        yield {"bench": "link", "rtt_ms": args.rtt_ms, "mbit": args.mbit, "loss": args.loss, **_tcp()}
        running = {}
        for name, python in duel.interpreters(contestants):
            assert isinstance(python, str), "none of these needs an environment of its own"
            running[name] = duel.start(
                contestants[name], python, host=ADDRESSES["left"], ends=(link.at("left"), link.at("right"))
            )
            stack.callback(running[name].close)
        for row in rows():
            if not args.rows or args.rows in row.name:
                yield from duel.measure("link", args, row, running, contestants)


def rows() -> Iterator[Row]:
    """All works."""
    bulk = Figure("rate", "MB/s", duel.megabytes, (Target("trio", at_least=AT_LEAST),))
    yield Row("one stream", {"work": "bulk"}, (bulk, Figure("cpu", "ns/B", duel.cpu_per_byte)))
    echo = Figure("p50", "ms", lambda result: float(result["p50_us"] / 1e3))
    yield Row("128 B echo", {"work": "echo", "bytes": 128, "callers": 1, "seconds": 2.0}, (echo,))
    first = Figure("p50", "ms", lambda result: float(result["p50_us"] / 1e3))
    yield Row("TCP to first reply", {"work": "connect", "count": 3}, (first,))


def _tcp() -> dict[str, str]:
    names = ("tcp_rmem", "tcp_wmem", "tcp_congestion_control")
    return {name: " ".join(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()) for name in names}
