"""The command line of tools/fuzz."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzzing import engine, targets
from fuzzing.coverage import lines_reached

PROGRAM = Path(__file__).resolve().parent.parent / "fuzz"


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says; 1 when something was found."""
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", help="which decoder; without one, the targets are listed")
    parser.add_argument("--all", action="store_true", help="every target, each in a process of its own")
    parser.add_argument("--inputs", type=int, help="how many inputs (100000 unless --seconds is given)")
    parser.add_argument("--seconds", type=float, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other inputs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once, with --all")
    parser.add_argument(
        "--coverage", action="store_true", help="trace the lines of the decoder that are reached"
    )
    parser.add_argument("--input", metavar="HEX", help="run this one input only")
    asked = parser.parse_args(arguments)
    if asked.inputs is None and asked.seconds is None:
        asked.inputs = 100_000
    if asked.all:
        return _all(asked)
    known, missing = targets.load()
    if asked.target is None:
        for name, target in known.items():
            print(f"{name:16} {target.purpose}")
        for name, reason in missing.items():
            print(f"{name:16} not here: {reason}")
        return 0
    if asked.target not in known:
        parser.error(missing.get(asked.target) or f"no target {asked.target!r}; they are {', '.join(known)}")
    target = known[asked.target]
    if asked.input is not None:
        print("accepted" if target.run(bytes.fromhex(asked.input)) else "refused")
        return 0
    if asked.coverage:
        report, reached = lines_reached(target, seed=asked.seed, inputs=asked.inputs, seconds=asked.seconds)
        for line in reached:
            print(line)
    else:
        report = engine.run(target, seed=asked.seed, inputs=asked.inputs, seconds=asked.seconds)
    return _print(report)


def _print(report: engine.Report) -> int:
    print(
        json.dumps(
            {
                "target": report.target,
                "seed": report.seed,
                "inputs": report.inputs,
                "accepted": report.accepted,
                "seconds": round(report.seconds, 1),
                "cpu_seconds": round(report.cpu_seconds, 1),
                "inputs_per_cpu_second": round(report.inputs / max(report.cpu_seconds, 1e-9)),
                "slowest_ms": round(report.slowest_seconds * 1000, 1),
                "peak_kib": report.peak_bytes >> 10,
                "grown_kib": report.grown_bytes >> 10,
                "findings": len(report.findings),
            }
        ),
        flush=True,
    )
    for finding in report.findings:
        print(f"\n{finding.target}: {finding.what}\ninput: {finding.data.hex()}", file=sys.stderr)
    return 1 if report.findings else 0


def _all(asked: argparse.Namespace) -> int:
    """Each target in a fresh process: what one leaves behind is no other's memory."""
    known, missing = targets.load()
    for name, reason in missing.items():
        print(f"{name} left out: {reason}", file=sys.stderr)
    bounds = [f"--seed={asked.seed}"]
    bounds += [f"--inputs={asked.inputs}"] if asked.inputs is not None else []
    bounds += [f"--seconds={asked.seconds}"] if asked.seconds is not None else []
    with ThreadPoolExecutor(asked.jobs) as pool:
        codes = pool.map(
            lambda name: subprocess.run([sys.executable, PROGRAM, name, *bounds], check=False).returncode,
            known,
        )
        return max(codes, default=0) and 1
