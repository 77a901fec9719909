"""The data folder: one node at a time, whose socket is found again wherever it had to go."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lattica import ConfigError
from lattica.folder import LOCK_FILE, MAX_SOCKET_PATH, holder, load_identity, lock, socket_path


def test_a_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    with lock(tmp_path / "deep" / "data"):
        assert stat.S_IMODE((tmp_path / "deep" / "data").stat().st_mode) == 0o700


def test_a_second_node_is_told_whose_folder_it_is(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError) as caught, lock(tmp_path):
        pass
    assert str(tmp_path) in str(caught.value)
    assert f"process {os.getpid()}" in str(caught.value)


def test_a_folder_is_free_again_afterwards(tmp_path: Path) -> None:
    with lock(tmp_path) as ours:
        assert holder(tmp_path) == ours
    assert holder(tmp_path) is None
    with lock(tmp_path):
        pass


def test_a_killed_node_leaves_the_folder_free(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys\nfrom lattica.folder import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == 9
    assert holder(tmp_path) is not None
    with lock(tmp_path) as ours:
        assert ours.pid == os.getpid()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"pid": 1}',
        '{"pid": "x", "control": "y"}',
        '{"pid": 1, "control": 7}',
        "[" * 5000,
    ],
)
def test_a_garbled_lock_file_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    assert holder(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for use in (load_identity, lambda folder: lock(folder).__enter__()):
        with pytest.raises(ConfigError, match=r"cannot create the data folder .*/file/data: Not a directory"):
            use(tmp_path / "file" / "data")


def test_a_short_path_keeps_its_socket(tmp_path: Path) -> None:
    assert socket_path(Path("/home/ada/.local/share/lattica")) == Path(
        "/home/ada/.local/share/lattica/control.sock"
    )


def test_a_long_path_has_its_socket_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    one, other = socket_path(Path("/" + "a" * 200)), socket_path(Path("/" + "b" * 200))
    assert one.parent == tmp_path / "lattica"
    assert one != other
    assert stat.S_IMODE(one.parent.stat().st_mode) == 0o700
    assert len(os.fsencode(one)) <= MAX_SOCKET_PATH


def test_without_a_runtime_folder_it_is_in_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    found = socket_path(Path("/" + "a" * 200)).parent
    assert found == Path(f"/tmp/lattica-{os.getuid()}")
    assert (found.stat().st_uid, stat.S_IMODE(found.stat().st_mode)) == (os.getuid(), 0o700)


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_somebody_elses_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "lattica"
    if kind == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "target")
    elif kind == "file":
        place.touch(mode=0o600)
    else:
        place.mkdir()
        place.chmod(0o770)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"lattica"):
        socket_path(Path("/" + "a" * 200))


def test_the_lock_file_tells_where_the_socket_is(tmp_path: Path) -> None:
    with lock(tmp_path):
        told = json.loads((tmp_path / LOCK_FILE).read_text())
    assert told == {"pid": os.getpid(), "control": str(tmp_path / "control.sock")}
