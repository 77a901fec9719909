"""Each bench of connections and calls, with tiny settings: it runs and prints what its docstring says.

No figure is asserted: that is what the benches themselves are for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Lines = list[dict[str, Any]]
BRIEF = ("--seconds", "0.05", "--rounds", "1")


def bench(repository: Path, name: str, *options: str) -> Lines:
    """What a bench prints."""
    words = [sys.executable, str(repository / "tools" / "bench.py"), name, *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def figures(lines: Lines) -> set[tuple[str, str, str]]:
    """Work, contestant and figure of each line that has a value, which is above nothing."""
    some = [line for line in lines if "contestant" in line and "value" in line]
    assert all(line["value"] > 0 and line["unit"] for line in some)
    return {(line["work"], line["contestant"], line["figure"]) for line in some}


def ratios(lines: Lines) -> dict[tuple[str, str, str], Any]:
    """Work, figure and contestants of each ratio, with its `at_least` or `at_most`."""
    return {
        (line["work"], line["figure"], line["ratio"]): line.get("at_least", line.get("at_most"))
        for line in lines
        if "ratio" in line
    }


def test_rpc_measures_two_sizes_from_three_numbers_of_callers(repository: Path) -> None:
    shown = figures(bench(repository, "rpc", "--only", "lattica", *BRIEF))
    works = [
        f"{size}, {callers}"
        for size in ("128 B", "256 KiB")
        for callers in ("1 caller", "16 callers", "64 callers")
    ]
    assert shown == {(work, "lattica", figure) for work in works for figure in ("calls", "cpu")} | {
        (f"{size}, 1 caller", "lattica", figure) for size in ("128 B", "256 KiB") for figure in ("p50", "p99")
    }


def test_rpc_compares_with_other_libraries_in_the_same_run(repository: Path) -> None:
    lines = bench(repository, "rpc", "--rows", "128 B, 64 callers", *BRIEF)
    left_out = {line["contestant"]: line["left_out"] for line in lines if "left_out" in line}
    for name, reason in left_out.items():
        if name == "pypi-lattica" and "namespace" in reason:
            continue  # only where no network namespace can be made
        assert os.environ.get("CI") != "true", f"{name}: {reason}"
        pytest.skip(f"{name} cannot run here: {reason}")
    wanted = {
        (line["contestant"], line["figure"]): line["value"]
        for line in lines
        if "contestant" in line and "value" in line
    }
    assert {name for name, _ in wanted} >= {"lattica", "grpc-aio", "grpc"}
    assert ratios(lines)["128 B, 64 callers", "calls", "lattica / grpc-aio"] == 2.5


def test_stream_measures_items_raw_streams_and_calls_beside_them(repository: Path) -> None:
    lines = bench(repository, "stream", "--only", "lattica,trio,libp2p", *BRIEF)
    shown = figures(lines)
    assert {(f"items of {size}", "lattica", "rate") for size in ("4 KiB", "64 KiB", "1 MiB")} < shown
    for name in ("lattica", "trio", "libp2p"):
        assert {
            ("bulk, one raw stream", name, "rate"),
            ("bulk, one raw stream", name, "cpu"),
            ("128 B on 1 raw stream", name, "p50"),
            ("128 B on 64 raw streams", name, "echoes"),
        } < shown
    assert ratios(lines)["bulk, one raw stream", "rate", "lattica / trio"] == 0.25
    beside = [line for line in lines if line.get("figure") == "p99_beside_over_alone"]
    assert [line["at_most"] for line in beside] == [10.0, 10.0], "sending and receiving"


def test_connect_measures_the_time_to_the_first_reply(repository: Path) -> None:
    lines = bench(repository, "connect", "--only", "lattica,trio,libp2p", "--count", "2", "--rounds", "1")
    work = "TCP to first reply"
    assert {(work, name, "p50") for name in ("lattica", "trio", "libp2p")} < figures(lines)
    assert next(line["at_most"] for line in lines if line.get("contestant") == "lattica") == 20.0


def test_start_says_where_the_time_goes(repository: Path) -> None:
    lines = bench(repository, "start", "--only", "lattica", "--repeat", "1")
    assert {line["work"]: line.get("at_most") for line in lines} == {
        "python -c pass": None,
        "lattica --help over python": 0.3,
        "node start until it serves": 1.5,
        "node start, split": None,
    }
    split = lines[-1]
    assert split["python"] + split["imports"] + split["opening"] == pytest.approx(split["whole"], abs=2)
    assert sum(split["imports_of"].values()) <= split["imports"] + len(split["imports_of"])


def test_idle_tells_memory_and_cpu(repository: Path) -> None:
    lines = bench(repository, "idle", "--connections", "3", "--seconds", "1")
    assert [(line["work"], line["figure"], line.get("at_most")) for line in lines] == [
        ("no connection", "memory", None),
        ("3 connections", "memory", 150.0),
        ("3 connections", "cpu", 1.0),
    ]


def test_soak_compares_a_node_before_and_after(repository: Path) -> None:
    lines = bench(repository, "soak", "--peers", "5", "--minutes", "0.02")
    for work in ("5 short-lived peers", "0.02 minutes of mixed load"):
        some = {line["figure"]: line for line in lines if line["work"] == work and "before" in line}
        assert set(some) == {"tasks", "peers", "descriptors", "threads", "memory"}
        assert some["memory"]["after"] > 0
        assert some["peers"]["holds"], some
        assert some["descriptors"]["holds"], some
