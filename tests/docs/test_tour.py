"""The README's five-minute tour, line by line, as a newcomer types it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def lines() -> list[str]:
    """The commands of all blocks fenced `sh tour`, in order."""
    blocks = re.findall(r"^```sh tour\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@contextmanager
def in_background(command: str, environment: dict[str, str]) -> Iterator[str]:
    """Run a command until the block ends; gives its first line on stdout, which says that it is up."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.real_model
def test_the_tour_works_as_it_is_written(tmp_path: Path) -> None:
    cache = os.environ.get("LATTICA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LATTICA_DATA_DIR": str(tmp_path / "node"),
        "XDG_CACHE_HOME": str(cache),
        "HOME": str(tmp_path),
    }
    start, *rest = lines()
    assert start.endswith("&")
    printed: dict[str, str] = {}
    with in_background(start.removesuffix("&"), environment) as up:
        assert up
        for command in rest:
            done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120,
                                  check=False)  # fmt: skip
            assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
            printed[command] = done.stdout
    assert "SmolLM2-135M-Instruct" in printed["lattica model ls"]
    answer = next(text for command, text in printed.items() if command.startswith("lattica generate"))
    assert "network" in answer
