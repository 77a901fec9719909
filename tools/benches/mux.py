"""What a connection's records and frames cost, without sockets and tasks: the native mux beside the Python reference.

Both ends in this process, CPU time, the two in turn; the median of some rounds. Bulk: 1 MiB at a time on one stream,
nanoseconds a byte for queueing and sealing, and for opening and reading. Small: 64 streams with 128 bytes each, all
sealed and opened in one go, microseconds a message at both ends together. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from lattica import _native
from lattica.net.mux import READABLE, Mux, ReferenceBudget, ReferenceMux, WindowBudget

KEYS = bytes([1]) * 32, bytes([2]) * 32
STREAMS = 64
SMALL_BYTES = 128
TAKE_BYTES = 256 * 1024  # what connections take and receive at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much."""
    parser.add_argument("--mib", type=int, default=64, help="bulk in a round [64]")
    parser.add_argument(
        "--batches", type=int, default=200, help="batches of 64 small messages in a round [200]"
    )
    parser.add_argument("--rounds", type=int, default=5, help="[5]")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a record for each figure and implementation, then the ratio."""
    kinds: dict[str, Callable[[bool], Mux]] = {
        "native": lambda initiator: _native.Mux(windows=WindowBudget(1 << 40), **_keys(initiator)),
        "reference": lambda initiator: ReferenceMux(windows=ReferenceBudget(1 << 40), **_keys(initiator)),
    }
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, make in kinds.items():
            figures = _bulk(*_pair(make), args.mib) | _small(*_pair(make), args.batches)
            for figure, value in figures.items():
                found.setdefault((figure, name), []).append(value)
    for figure in dict.fromkeys(figure for figure, _ in found):
        native, reference = (statistics.median(found[figure, name]) for name in kinds)
        yield {
            "bench": "mux",
            "figure": figure,
            "native": round(native, 3),
            "reference": round(reference, 3),
        } | {"ratio": round(reference / native, 1)}


def _keys(initiator: bool) -> dict[str, Any]:
    send_key, receive_key = KEYS if initiator else KEYS[::-1]
    return {"initiator": initiator, "send_key": send_key, "receive_key": receive_key}


def _pair(make: Callable[[bool], Mux]) -> tuple[Mux, Mux]:
    one, two = make(True), make(False)
    one.start(b"")
    two.start(b"")
    return one, two


def _bulk(one: Mux, two: Mux, mib: int) -> dict[str, float]:
    stream = one.open_stream()
    data = memoryview(bytes(1 << 20))
    sealing = opening = 0.0
    for _ in range(mib):
        rest = data
        while rest:
            begun = time.process_time()
            rest = rest[one.send(stream, rest) :]
            sealed, _ = one.take_output(TAKE_BYTES)
            sent = time.process_time()
            two.receive(sealed, 0.0)
            while two.available(stream):
                two.read(stream, TAKE_BYTES)
            credit, _ = two.take_output(TAKE_BYTES)
            opened = time.process_time()
            one.receive(credit, 0.0)
            sealing += sent - begun
            opening += opened - sent
    size = mib << 20
    return {"seal ns/B": sealing / size * 1e9, "open ns/B": opening / size * 1e9}


def _small(one: Mux, two: Mux, batches: int) -> dict[str, float]:
    streams = [one.open_stream() for _ in range(STREAMS)]
    data = bytes(SMALL_BYTES)
    begun = time.process_time()
    for _ in range(batches):
        for stream in streams:
            one.send_all_or_nothing(stream, (data,))
        sealed, _ = one.take_output(TAKE_BYTES)
        for kind, stream, _ in two.receive(sealed, 0.0):
            if kind == READABLE:
                two.read(stream, TAKE_BYTES)
        one.receive(two.take_output(TAKE_BYTES)[0], 0.0)
    return {"small us": (time.process_time() - begun) / batches / STREAMS * 1e6}
