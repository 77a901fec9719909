"""How a contestant's process talks with the bench: JSON lines on stdin and stdout.

`PROGRAM serve HOST` prints {"address"} once it answers, and a line of its state for each line that it reads.
`PROGRAM client ADDRESS` prints {"ready"}, then does the job of each line that it reads and prints the result.
Both end with stdin. Standard library only: each contestant has an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Job = dict[str, Any]
Result = dict[str, Any]

BULK_CHUNK_BYTES = 256 * 1024  # of every contestant's bulk stream
MAX_MESSAGE_BYTES = 8 << 20  # more than any job sends


def say(line: dict[str, Any]) -> None:
    """Print one line for the bench."""
    print(json.dumps(line), flush=True)


def next_job() -> Job | None:
    """The bench's next job; None when it has gone. Blocks: call it in a thread beside an event loop."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve_state(more: Callable[[], dict[str, Any]] = dict) -> None:
    """Answer the bench from a thread until it goes; then end the process."""

    def answer() -> None:
        while sys.stdin.readline():
            say({"cpu_seconds": cpu_seconds(), **more()})
        os._exit(0)  # nothing here is worth an orderly end

    threading.Thread(target=answer, daemon=True).start()


class Tally:
    """Counts what a job has done: each piece's latency, and the time that all took together."""

    def __init__(self, seconds: float) -> None:
        self._latencies: list[float] = []
        self._cpu = cpu_seconds()
        self._started = time.perf_counter()
        self._until = self._started + seconds
        self.bytes = 0

    def open(self) -> bool:
        """Whether another piece should be begun; one that has begun is finished and counted."""
        return time.perf_counter() < self._until

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Measure one piece."""
        started = time.perf_counter()
        yield
        self._latencies.append(time.perf_counter() - started)

    def result(self) -> Result:
        """What the bench is told. Times in microseconds, the rest in seconds and bytes."""
        seconds = time.perf_counter() - self._started
        ordered = sorted(self._latencies)

        def at(share: float) -> float | None:
            return ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1e6 if ordered else None

        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - self._cpu,
            "pieces": len(ordered),
            "bytes": self.bytes,
            "p50_us": at(0.5),
            "p99_us": at(0.99),
        }
