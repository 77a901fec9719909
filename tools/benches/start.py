"""Start-up: `lattica --help` beside `python -c pass`, and `lattica node start` until it serves, with where that goes.

The runs are interleaved. The node's time is split by one more run under `-X importtime`: what Python takes by itself,
what imports take (by top-level package, each without what it imports in turn), and the rest, which opens the node.
Beside it the package lattica from PyPI: a process until its node is built. Prints a JSON line for each work, with its
limit `at_most` where there is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import _duel as duel
import namespaces  # tools/namespaces.py

CHECKOUT = Path(__file__).resolve().parents[2]
NODE_AT_MOST_SECONDS = 1.5
HELP_AT_MOST_SECONDS = 0.3  # over `python -c pass`: a command that answers slower than this feels slow
PACKAGES_SHOWN = 8
PEER = "pypi-lattica"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often, and whether beside another."""
    parser.add_argument("--repeat", type=int, default=7, help="runs of each, interleaved [7]")
    parser.add_argument("--only", help=f"contestants, comma between them [{duel.OURS},{PEER}]")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield medians in seconds, and the split in milliseconds."""
    peer: str | OSError = OSError("not asked for")
    if args.only is None or PEER in args.only.split(","):
        peer = dict(duel.interpreters({PEER: duel.KNOWN[PEER]}))[PEER]
        try:
            namespaces.enter_fresh()  # it contacts public servers
        except OSError as error:
            peer = error
        if isinstance(peer, OSError):
            yield {"bench": "start", "contestant": PEER, "left_out": str(peer)}
    times: dict[str, list[float]] = {"python": [], "help": [], "node": [], "peer": []}
    for _ in range(args.repeat):
        times["python"].append(seconds("-c", "pass"))
        times["help"].append(seconds("-m", "lattica", "--help"))
        times["node"].append(node_seconds()[0])
        if isinstance(peer, str):
            times["peer"].append(peer_seconds(peer))
    over = median(times["help"]) - median(times["python"])
    yield line("python -c pass", median(times["python"]))
    yield line("lattica --help over python", over) | duel.judged(over, at_most=HELP_AT_MOST_SECONDS)
    node = median(times["node"])
    yield line("node start until it serves", node) | duel.judged(node, at_most=NODE_AT_MOST_SECONDS)
    if times["peer"]:
        yield line("process start until its node is built", median(times["peer"])) | {"contestant": PEER}
    yield split()


def line(work: str, value: float) -> dict[str, Any]:
    """One figure in seconds."""
    return {
        "bench": "start",
        "work": work,
        "contestant": duel.OURS,
        "figure": "time",
        "unit": "s",
        "value": duel.rounded(value),
    }


def seconds(*arguments: str) -> float:
    """How long a Python process with these arguments takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=CHECKOUT)
    return time.perf_counter() - started


def node_seconds(*options: str) -> tuple[float, str]:
    """From starting `lattica node start` in an empty folder to its ready line; and its stderr.

    `options` are the interpreter's.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        words = [*options, "-m", "lattica", "node", "start", "--json", "--log-level", "error"]
        words += ["--data", folder, "--listen", "/ip4/127.0.0.1/tcp/0"]
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=CHECKOUT
        ) as node:
            assert node.stdout is not None
            ready = node.stdout.readline()
            took = time.perf_counter() - started
            node.terminate()
        errors.seek(0)
        said = errors.read()
        if not ready:
            raise SystemExit(f"the node did not start: {said.strip()[-300:]}")
        return took, said


def peer_seconds(python: str) -> float:
    """From starting the other's server process to its address line."""
    started = time.perf_counter()
    server = duel.Process([python, str(duel.KNOWN[PEER].script), "serve", "127.0.0.1"])
    try:
        server.read()
        return time.perf_counter() - started
    finally:
        server.close()


def split() -> dict[str, Any]:
    """Where a start goes; all of it from one run, which -X importtime makes somewhat slower."""
    whole, said = node_seconds("-X", "importtime")
    own = imports(said)
    bare = subprocess.run([sys.executable, "-X", "importtime", "-c", "pass"], capture_output=True, text=True)
    own.subtract(imports(bare.stderr))  # part of Python's own start
    python, imported = seconds("-c", "pass"), sum(own.values()) / 1e6
    return {
        "bench": "start",
        "work": "node start, split",
        "contestant": duel.OURS,
        "unit": "ms",
        "whole": round(whole * 1e3),
        "python": round(python * 1e3),
        "imports": round(imported * 1e3),
        "opening": round((whole - python - imported) * 1e3),
        "imports_of": {name: round(took / 1e3) for name, took in own.most_common(PACKAGES_SHOWN)},
    }


def imports(said: str) -> Counter[str]:
    """Microseconds by top-level package, from what -X importtime says: lines of own time | with imports | name."""
    own: Counter[str] = Counter()
    for found in re.finditer(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", said, re.MULTILINE):
        own[found[2].partition(".")[0]] += int(found[1])
    return own
