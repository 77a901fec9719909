"""Peers of other languages, built when a test first asks for one."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(
    0, str(Path(__file__).parent)
)  # tests are no package; the modules beside this file have own names

from interop_build import RECIPES, MissingToolchainError, peer_command
from interop_peers import RunPeer, run_peer


@pytest.fixture(scope="session", params=list(RECIPES))
def language(request: pytest.FixtureRequest) -> str:
    """The other peer's language; each test runs for every one."""
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="session")
def run_other(language: str, request: pytest.FixtureRequest) -> RunPeer:
    """`run_other(**options)` runs that language's peer; see `interop_peers.run_peer`."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\ninterop: {line}", file=sys.stderr, flush=True)

    try:
        return partial(run_peer, peer_command(language, say))
    except MissingToolchainError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
