"""What an idle node costs: memory and CPU of `lattica node start` with 50 connections that nobody uses.

The node is a process of its own, its 50 peers live in another; Linux only, read from /proc. Prints a JSON line each
for the resident memory before and with the connections and for the share of a core over the time watched, with the
limits `at_most`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _duel as duel
import _proc as proc

CHECKOUT = Path(__file__).resolve().parents[2]
MEMORY_AT_MOST_MB = 150.0
CPU_AT_MOST_PERCENT = 1.0
SETTLE_SECONDS = 5.0  # identify and the first pings are over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many, how long."""
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0, help="watched [30]")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield memory in MB (10^6 bytes), then CPU in percent of a core."""
    head = {"bench": "idle", "contestant": duel.OURS}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "lattica", "node", "start", "--json", "--log-level", "error"]
        words += ["--data", folder, "--listen", "/ip4/127.0.0.1/tcp/0"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as node:
            try:
                assert node.stdout is not None
                address = json.loads(node.stdout.readline())["addresses"][0]
                alone, sockets = proc.memory_bytes(node.pid), proc.descriptors(node.pid)
                peers = duel.Process([sys.executable, str(duel.KNOWN[duel.OURS].script), "client", address])
                try:
                    peers.read()
                    peers.ask({"work": "crowd", "count": args.connections - 1, "address": address})
                    time.sleep(SETTLE_SECONDS)
                    held = proc.descriptors(node.pid) - sockets
                    assert held >= args.connections, f"{held} of {args.connections} connections live"
                    before, started = proc.cpu_seconds(node.pid), time.monotonic()
                    time.sleep(args.seconds)
                    used = proc.cpu_seconds(node.pid) - before
                    percent = used / (time.monotonic() - started) * 100
                    memory = proc.memory_bytes(node.pid) / 1e6
                finally:
                    peers.close()
            finally:
                node.terminate()
    for work, figure, unit, value, limit in (
        ("no connection", "memory", "MB", alone / 1e6, None),
        (f"{args.connections} connections", "memory", "MB", memory, MEMORY_AT_MOST_MB),
        (f"{args.connections} connections", "cpu", "% of a core", percent, CPU_AT_MOST_PERCENT),
    ):
        yield {
            **head,
            "work": work,
            "figure": figure,
            "unit": unit,
            "value": duel.rounded(value),
            **duel.judged(value, at_most=limit),
        }
