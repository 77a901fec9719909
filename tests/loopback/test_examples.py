"""The examples run as they stand, over real sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(repository: Path, name: str) -> list[str]:
    """What an example prints; it says nothing on stderr, and fits on a page."""
    script = repository / "examples" / name
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_the_greeter_makes_calls_of_every_shape(repository: Path) -> None:
    hello, *others = run(repository, "greeter.py")
    assert hello.startswith("hello Ada, says 12D3Koo")
    assert others == ["count: [0, 1, 2]", "total: 42", "refused: greeter.hello takes 1 argument, got 0"]


def test_the_portal_makes_the_same_calls_without_async(repository: Path) -> None:
    hello, *others = run(repository, "portal.py")
    assert hello.startswith("hello Ada, says 12D3Koo")
    assert others == ["count: [0, 1, 2]", "total: 42", "refused: greeter.hello takes 1 argument, got 0"]


def test_a_worker_is_found_by_its_record_and_called(repository: Path) -> None:
    kept, answer = run(repository, "records.py")
    assert kept == "ada's note is kept by 1 peer"
    assert "says [320, 240], until " in answer


@pytest.mark.parametrize("name", ["greeter.py", "portal.py", "records.py", "three_shards.py"])
def test_an_example_fits_on_a_page(repository: Path, name: str) -> None:
    assert len((repository / "examples" / name).read_text().splitlines()) < 60
