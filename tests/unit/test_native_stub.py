from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_stub_says_what_the_native_module_has() -> None:
    command = [
        sys.executable,
        "-m",
        "mypy.stubtest",
        "lattica._native",
        "--mypy-config-file",
        "pyproject.toml",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
