"""Inputs that once broke a decoder, again; and many new ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import engine, targets

REGRESSIONS = Path(__file__).parent / "regressions"
INPUTS = 100_000  # of each target; more belongs to the background: CONTRIBUTING.md, "Fuzzing"
TARGETS, MISSING = targets.load()


def kept() -> list[object]:
    """Every line of hex in regressions/TARGET.txt, named by the comment above it."""
    cases = []
    for path in sorted(REGRESSIONS.glob("*.txt")):
        what = ""
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                what = line[1:].strip()
            elif line:
                cases.append(pytest.param(path.stem, bytes.fromhex(line), id=f"{path.stem}: {what}"))
    return cases


@pytest.mark.parametrize(("name", "data"), kept())
def test_an_input_that_broke_a_decoder_once_does_not_again(name: str, data: bytes) -> None:
    if name in MISSING:
        pytest.skip(MISSING[name])
    TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs_of_each_target_give_no_finding(name: str) -> None:
    report = engine.run(TARGETS[name], seed=1, inputs=engine.BATCH)
    assert report.findings == []
    assert 0 < report.accepted < report.inputs


@pytest.mark.slow
def test_a_hundred_thousand_inputs_of_each_target_give_no_finding(repository: Path) -> None:
    command = [sys.executable, repository / "tools" / "fuzz", "--all", f"--inputs={INPUTS}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["target"]: report["inputs"] for report in reports} == dict.fromkeys(TARGETS, INPUTS)
