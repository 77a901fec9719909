"""Start-up: `lattica --help` beside `python -c pass`, and a node until it serves."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from statistics import median

HELP_GOAL_SECONDS = 0.3  # over `python -c pass`: a command that answers slower than this feels slow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--repeat`."""
    parser.add_argument("--repeat", type=int, default=7, help="runs of each, interleaved [7]")


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Medians in seconds; the runs are interleaved, so that a busy machine slows all of them alike."""
    nothing, shown, ready = [], [], []
    for _ in range(args.repeat):
        nothing.append(seconds("-c", "pass"))
        shown.append(seconds("-m", "lattica", "--help"))
        ready.append(seconds_until_ready())
    over = median(shown) - median(nothing)
    yield {
        "bench": "start",
        "python_seconds": round(median(nothing), 3),
        "help_seconds": round(median(shown), 3),
        "help_over_python_seconds": round(over, 3),
        "help_goal_seconds": HELP_GOAL_SECONDS,
        "help_within_goal": over <= HELP_GOAL_SECONDS,
        "node_ready_seconds": round(median(ready), 3),
    }


def seconds(*arguments: str) -> float:
    """How long a Python process with these arguments takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_until_ready() -> float:
    """From starting `lattica node start` in an empty folder to its ready line."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "lattica", "node", "start", "--json", "--log-level", "error"]
        words += ["--data", folder, "--listen", "/ip4/127.0.0.1/tcp/0"]
        started = time.perf_counter()
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as node:
            assert node.stdout is not None
            line = node.stdout.readline()
            took = time.perf_counter() - started
            node.terminate()
            assert line, "the node did not start"
    return took
