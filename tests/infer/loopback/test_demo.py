"""`lattica demo` as a user runs it: to its end, stopped in the middle, and with what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LATTICA = [sys.executable, "-P", "-m", "lattica"]


def children_of(folder: Path) -> list[int]:
    """Processes whose command line names `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if str(folder) in command:
                found.append(int(entry.name))
    return found


@contextmanager
def demo(tmp_path: Path, model: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo of a tiny model, its temporary files in `tmp_path`."""
    command = [*LATTICA, "demo", "--model", str(model), "--max-tokens", "24", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path), "LATTICA_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_demo_compares_two_runs_over_the_peers_it_names(tmp_path: Path, tiny_model: Path) -> None:
    with demo(tmp_path, tiny_model, "--json", "--link-ms", "20", "--shards", "2") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["identical"] is True
    assert report["plain"]["tokens"] == report["speculative"]["tokens"]
    assert report["plain"]["rounds"] == report["plain"]["count"]
    assert report["link_ms"] == 20.0
    roles = [peer["role"] for peer in report["peers"]]
    assert roles == ["bootstrap", "shard-1", "shard-2", "coordinator"]
    assert [peer["layers"] for peer in report["peers"]] == [None, [0, 2], [2, 5], None]
    assert all(peer["rtt_ms"] >= 40.0 for peer in report["peers"][:-1])
    assert "every link delayed by 20 ms" in err
    assert children_of(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("said", ["starting", "loading"])
def test_a_demo_that_is_stopped_leaves_nothing_behind(
    tmp_path: Path, tiny_model: Path, sign: signal.Signals, said: str
) -> None:
    with demo(tmp_path, tiny_model) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(said):
                break
        process.send_signal(sign)
        assert process.wait(timeout=30) == 130
    assert children_of(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] in (["cache"], [])


def test_a_demo_that_is_killed_takes_its_processes_along(tmp_path: Path, tiny_model: Path) -> None:
    with demo(tmp_path, tiny_model) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("loading"):
                break
        nodes = children_of(tmp_path)
        assert len(nodes) == 5
        process.kill()
        process.wait(timeout=30)
        for pid in nodes:
            descriptor = os.pidfd_open(pid) if pid in children_of(tmp_path) else None
            if descriptor is not None:  # readable once the process has ended
                import select

                assert select.select([descriptor], [], [], 30)[0], f"process {pid} outlived the demo"
                os.close(descriptor)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--shards", "6"], 2, "--shards 6 is more than the model's 5 layers"),
        (["--prompt", "word " * 600], 1, "the context of"),
        (["--link-ms", "-1"], 2, "link-ms"),
    ],
)
def test_what_the_demo_cannot_do_is_one_sentence(
    tmp_path: Path, tiny_model: Path, options: list[str], code: int, message: str
) -> None:
    with demo(tmp_path, tiny_model, *options) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert message in err
    assert "Traceback" not in err
    assert children_of(tmp_path) == []


def test_an_unknown_model_is_one_sentence() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with demo(Path(folder), Path(folder) / "nothing") as process:
            _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
