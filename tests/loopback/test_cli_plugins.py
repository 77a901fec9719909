"""Packages add commands, and services in the node, by entry points alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """
from contextlib import asynccontextmanager
from pathlib import Path
import os

def register(app):
    from lattica.cli.common import DataOption, JsonOption, control, emit, run

    @app.command()
    def greet(data: DataOption = None, json: JsonOption = False) -> None:
        async def ask():
            async with control(data) as node:
                return await node.call("greeter.greet", "Ada")
        emit(run(ask), json)

@asynccontextmanager
async def open_services(node):
    from lattica import RecordError, Service
    service = Service("greeter")

    @service.method
    async def greet(call, name):
        if os.environ.get("GREETER") == "sulks":
            raise RecordError("not today")
        return [f"hello {name}", str(call.peer), str(call.local)]

    node.control.register(service)
    node.serves["greeter"] = "greetings"
    try:
        yield
    finally:
        (node.data_dir / "greeter-left").touch()
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with two installed packages: one that works, one that cannot be imported."""
    folder = tmp_path / "packages"
    for name, code in (("lattica_greeter", PLUGIN), ("lattica_broken", "import no_such_module")):
        (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
        (folder / f"{name}.py").write_text(code)
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(
            f"[lattica.commands]\n{name} = {name}:register\n\n"
            f"[lattica.services]\n{name} = {name}:open_services\n"
        )
    return folder


@pytest.mark.parametrize("mood", ["greets", "sulks"])
def test_a_package_adds_a_command_and_its_service(packages: Path, tmp_path: Path, mood: str) -> None:
    here = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{here}", "GREETER": mood}
    command = [sys.executable, "-m", "lattica"]
    data = ["--data", str(tmp_path / "node")]
    start = [*command, "node", "start", "--json", "--listen", "/ip4/127.0.0.1/tcp/0", *data]
    with subprocess.Popen(
        start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as node:
        try:
            assert node.stdout is not None
            peer_id = json.loads(node.stdout.readline())["peer_id"]
            done = subprocess.run(
                [*command, "greet", "--json", *data],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            node.send_signal(signal.SIGTERM)
            _, said = node.communicate(timeout=30)
    warning = (
        "warning: the commands of lattica_broken:register cannot be loaded: No module named 'no_such_module'"
    )
    assert warning in done.stderr
    if mood == "greets":
        assert (done.returncode, json.loads(done.stdout)) == (0, ["hello Ada", "None", peer_id])
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1] == "error: not today"
    assert node.returncode == 0
    assert "lattica_broken" in said
    assert (tmp_path / "node" / "greeter-left").exists()
