"""The example runs as it stands, over real sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_greeter_example_says_what_it_shows(repository: Path) -> None:
    script = repository / "examples/greeter.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    hello, *others = done.stdout.splitlines()
    assert hello.startswith("hello Ada, says 12D3Koo")
    assert others == ["count: [0, 1, 2]", "total: 42", "refused: greeter.hello takes 1 argument, got 0"]
    assert done.stderr == ""
    assert len(script.read_text().splitlines()) < 60
