"""Short-lived peers over a node's life, then minutes of mixed load: what the node holds before, after each.

A server in a process of its own; its visitors, one after another, in another: a node each that connects, calls, leaves
a stream half read or open now and then, and goes. Then small and large calls, raw streams, items and cancelled calls,
all at once on one connection. Once it is quiet again, the server's tasks, peers, descriptors and threads should be
what they were, and its memory near it. Linux only. Prints a JSON line for each load and figure with `before`, `after`
and, for counts, whether it `holds`; and how much was done. `--peers 2000 --minutes 30` is the long run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import _duel as duel
import _proc as proc

VISITORS_IN_A_JOB = 50  # so that a job ends well before it is given up
MIXED_SECONDS_IN_A_JOB = 10.0
WARM_UP_VISITORS = 50  # caches fill once
WARM_UP_CALLERS = 64  # and so does the pool of idle streams: a task of the server's may wait on each
QUIET_SECONDS = 15.0  # at most, until what the last load left behind is gone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many, how long."""
    parser.add_argument("--peers", type=int, default=500, help="short-lived ones [500]")
    parser.add_argument("--minutes", type=float, default=0.5, help="of mixed load [0.5]")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each load left behind."""
    running = duel.start(duel.KNOWN[duel.OURS], sys.executable)
    try:
        _visit(running, WARM_UP_VISITORS)
        running.do({"work": "calls", "bytes": 128, "callers": WARM_UP_CALLERS, "seconds": 0.5})
        _load(running, min(args.minutes * 60, MIXED_SECONDS_IN_A_JOB))
        before = _quiet(running, None)
        started = time.monotonic()
        _visit(running, args.peers)
        took = time.monotonic() - started
        after = _quiet(running, before)
        work = f"{args.peers} short-lived peers"
        yield from _compare(work, before, after)
        yield _done(work, "peers", "1/s", args.peers / took)
        before = after
        pieces, seconds = _load(running, args.minutes * 60)
        work = f"{args.minutes:g} minutes of mixed load"
        yield from _compare(work, before, _quiet(running, before))
        yield _done(work, "calls", "1/s", pieces / seconds)
    finally:
        running.close()


def _visit(running: duel.Running, count: int) -> None:
    for first in range(0, count, VISITORS_IN_A_JOB):
        running.do({"work": "visitors", "count": min(VISITORS_IN_A_JOB, count - first)})


def _load(running: duel.Running, seconds: float) -> tuple[int, float]:
    """Calls made, and the seconds they took."""
    pieces, took = 0, 0.0
    while took < seconds:
        result = running.do({"work": "mixed", "seconds": min(MIXED_SECONDS_IN_A_JOB, seconds - took)})
        pieces += result["pieces"]
        took += result["seconds"]
    return pieces, took


def _quiet(running: duel.Running, wanted: dict[str, int] | None) -> dict[str, int]:
    """What the server holds once its counts are those wanted, or have not changed for a second, or time is up."""
    until = time.monotonic() + QUIET_SECONDS
    last, since = _state(running), time.monotonic()
    while time.monotonic() < until:
        time.sleep(0.1)
        now = _state(running)
        if wanted is not None and all(now[name] <= wanted[name] for name in COUNTS):
            return now
        if any(now[name] != last[name] for name in COUNTS):
            last, since = now, time.monotonic()
        elif wanted is None and time.monotonic() - since > 1.0:
            return now
    return _state(running)


COUNTS = ("tasks", "peers", "descriptors", "threads")


def _state(running: duel.Running) -> dict[str, int]:
    told = running.server.ask({})
    return {
        "tasks": told["tasks"],
        "peers": told["peers"],
        "descriptors": proc.descriptors(running.server.pid),
        "threads": proc.threads(running.server.pid),
        "memory": proc.memory_bytes(running.server.pid),
    }


def _compare(work: str, before: dict[str, int], after: dict[str, int]) -> Iterator[dict[str, Any]]:
    for name in COUNTS:
        counts = {"before": before[name], "after": after[name], "holds": after[name] <= before[name]}
        yield {"bench": "soak", "work": work, "figure": name, "unit": "1", **counts}
    memory = {
        moment: round(state["memory"] / 1e6, 1) for moment, state in (("before", before), ("after", after))
    }
    yield {"bench": "soak", "work": work, "figure": "memory", "unit": "MB", **memory}


def _done(work: str, figure: str, unit: str, value: float) -> dict[str, Any]:
    return {"bench": "soak", "work": work, "figure": figure, "unit": unit, "value": duel.rounded(value)}
