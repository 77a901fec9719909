"""Settings for every test: nothing reads the developer's own node, configuration or environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Derandomised: the same inputs in every run, so that a failure here is a failure everywhere. The long runs with
# fresh seeds belong to the fuzz targets.
settings.register_profile("lattica", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("lattica")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No LATTICA_* variable of the developer's reaches a test."""
    for name in os.environ:
        if name.startswith("LATTICA_") and name != "LATTICA_CACHE_DIR":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that this test stands in."""
    return Path(__file__).resolve().parent.parent
