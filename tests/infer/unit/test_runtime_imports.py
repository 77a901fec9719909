"""A coordinator needs no torch, and no command of inference waits for torch or the network to load."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    ["lattica_infer", "lattica_infer.cli", "lattica_infer.services", "lattica_infer.client.service"],
)
def test_importing_loads_neither_torch_nor_libp2p(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'libp2p') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import lattica_infer

    for name in lattica_infer.__all__:
        assert getattr(lattica_infer, name).__name__ == name
