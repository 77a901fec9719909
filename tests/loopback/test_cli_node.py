"""The commands as processes, on 127.0.0.1: what they print, how they fail, what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0")
Finished = subprocess.CompletedProcess[str]


def lattica(*arguments: str, data: Path | None = None, environment: dict[str, str] | None = None) -> Finished:
    """Run a command to its end."""
    words = [sys.executable, "-m", "lattica", *arguments, *(("--data", str(data)) if data else ())]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(environment or {})},
        check=False,
    )


@dataclass
class Running:
    """A node in a process of its own, ready."""

    process: subprocess.Popen[str]
    data: Path
    ready: dict[str, Any]

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"])

    @property
    def address(self) -> str:
        return str(self.ready["addresses"][0])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code and what was still to read of stdout and stderr."""
        self.process.send_signal(how)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start nodes; they are killed when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str = "node", *arguments: str, data: Path | None = None) -> Running:
        folder = data or tmp_path / name
        words = ["node", "start", "--json", "--data", str(folder), *LISTEN, *arguments]
        process = subprocess.Popen(
            [sys.executable, "-m", "lattica", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        return Running(process, folder, json.loads(line))

    yield start
    for process in started:
        process.kill()
        process.communicate()


def one_sentence(done: Finished) -> str:
    """The error of a command that failed: a line on stderr, nothing on stdout."""
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_node_says_when_it_serves_and_where(start: Start) -> None:
    node = start()
    assert node.ready.keys() == {"ready", "peer_id", "addresses"}
    assert node.ready["ready"] is True
    assert node.address.startswith("/ip4/127.0.0.1/tcp/")
    assert node.address.endswith(f"/p2p/{node.peer_id}")


def test_two_nodes_meet_and_name_each_other(start: Start) -> None:
    first = start("first")
    second = start("second", "--bootstrap", first.address)
    told = json.loads(lattica("ping", first.peer_id, "--json", data=second.data).stdout)
    assert told["peer_id"] == first.peer_id
    assert 0 < told["rtt_ms"] < 5000
    (row,) = json.loads(lattica("peers", "--json", data=second.data).stdout)
    assert row.keys() == {
        "peer_id", "path", "via", "rtt_ms", "addresses", "agent", "serves", "seen_seconds",
    }  # fmt: skip
    assert (row["peer_id"], row["path"], row["via"]) == (first.peer_id, "direct", None)
    status = json.loads(lattica("node", "status", "--json", data=first.data).stdout)
    assert status.keys() == {
        "peer_id", "addresses", "reachability", "mapping", "relays", "connections", "uptime_seconds",
    }  # fmt: skip
    assert status["connections"] == 1
    assert status["addresses"] == first.ready["addresses"]


def test_people_get_words(start: Start) -> None:
    first = start("first")
    second = start("second", "--bootstrap", first.address)
    assert lattica("ping", first.address, data=second.data).stdout.startswith(f"{first.peer_id}: ")
    assert f"peer id:      {first.peer_id}\n" in lattica("node", "status", data=first.data).stdout
    table = lattica("peers", data=second.data).stdout
    assert first.peer_id in table.replace("\n", "").replace(" ", "") or first.peer_id[:26] in table
    assert "direct" in table


def test_peers_watch_goes_on_until_its_reader_leaves(start: Start) -> None:
    node = start()
    watch = subprocess.Popen(
        [sys.executable, "-m", "lattica", "peers", "--watch", "--json", "--data", str(node.data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None
    assert [json.loads(watch.stdout.readline()) for _ in range(2)] == [[], []]
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=30)
    assert (watch.returncode, err) == (130, "")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_node_in_peace(start: Start, how: signal.Signals) -> None:
    node = start()
    code, out, err = node.stop(how)
    assert (code, out) == (0, "")
    assert "Traceback" not in err
    assert not (node.data / "control.sock").exists()
    assert lattica("node", "status", data=node.data).returncode == 3


def test_a_peer_id_outlives_the_node(start: Start, tmp_path: Path) -> None:
    told = json.loads(lattica("node", "id", "--json", data=tmp_path / "node").stdout)
    node = start("node")
    assert node.peer_id == told["peer_id"]
    assert lattica("node", "id", data=tmp_path / "node").stdout == f"{node.peer_id}\n"
    assert stat.S_IMODE((tmp_path / "node" / "identity.pem").stat().st_mode) == 0o600


def test_the_control_socket_is_closed_to_others(start: Start) -> None:
    node = start()
    assert stat.S_IMODE((node.data / "control.sock").stat().st_mode) == 0o600


def test_garbage_on_the_control_socket_harms_nobody(start: Start) -> None:
    node = start()
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)), b"\xff" * 64):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(node.data / "control.sock"))
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert lattica("node", "status", data=node.data).returncode == 0


def test_a_long_folder_has_a_working_socket(start: Start, tmp_path: Path) -> None:
    node = start(data=tmp_path / ("long" * 40))
    assert lattica("node", "status", data=node.data).returncode == 0
    assert not (node.data / "control.sock").exists()


def test_a_killed_node_is_not_running_and_can_be_started_again(start: Start) -> None:
    node = start()
    node.stop(signal.SIGKILL)
    assert lattica("node", "status", data=node.data).returncode == 3
    again = start()
    assert again.peer_id == node.peer_id
    assert lattica("node", "status", data=again.data).returncode == 0


@pytest.mark.parametrize("command", [("node", "status"), ("peers",), ("ping", "12D3KooW" + "A" * 44)])
def test_without_a_node_the_exit_code_is_three(tmp_path: Path, command: tuple[str, ...]) -> None:
    if command[0] == "ping":
        command = ("ping", "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")
    done = lattica(*command, data=tmp_path / "nobody")
    assert done.returncode == 3
    assert f"lattica node start --data {tmp_path / 'nobody'}" in one_sentence(done)


def test_a_folder_serves_one_node(start: Start) -> None:
    node = start()
    done = lattica("node", "start", *LISTEN, data=node.data)
    assert done.returncode == 1
    assert f"process {node.process.pid}" in one_sentence(done)


def test_a_port_in_use_is_named(start: Start, tmp_path: Path) -> None:
    taken = start().address.rpartition("/p2p/")[0]
    done = lattica("node", "start", "--listen", taken, data=tmp_path / "other")
    assert done.returncode == 1
    assert taken.rpartition("/")[2] in one_sentence(done)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in (("node", "start", *LISTEN), ("node", "id")):
        done = lattica(*command, data=tmp_path / "file" / "data")
        assert done.returncode == 1
        assert "file/data: Not a directory" in one_sentence(done)


def test_a_broken_key_is_an_error_and_stays(tmp_path: Path) -> None:
    key = tmp_path / "identity.pem"
    key.write_text("broken")
    key.chmod(0o600)
    for command in (("node", "start", *LISTEN), ("node", "id")):
        done = lattica(*command, data=tmp_path)
        assert done.returncode == 1
        assert str(key) in one_sentence(done)
    assert key.read_text() == "broken"


@pytest.mark.parametrize(
    ("arguments", "environment", "word"),
    [
        (("node", "start", "--listen", "4001"), {}, "argument --listen"),
        (("node", "start", "--bootstrap", "/ip4/1.2.3.4/tcp/1"), {}, "/p2p/ID"),
        (("node", "start"), {"LATTICA_LISTEM": "x"}, "did you mean LATTICA_LISTEN?"),
        (("node", "start"), {"LATTICA_METRICS": "x"}, "environment LATTICA_METRICS"),
        (("ping", "12D3"), {}, "not a peer id: '12D3'"),
        (("ping", "/ip4/1.2.3.4/tcp/1"), {}, "names no peer"),
    ],
)
def test_wrong_usage_is_exit_code_two(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], word: str
) -> None:
    done = lattica(*arguments, data=tmp_path, environment=environment)
    assert done.returncode == 2
    assert word in one_sentence(done)


def test_an_unknown_option_is_exit_code_two() -> None:
    assert lattica("node", "start", "--lisen", "x").returncode == 2


def test_the_settings_are_printed_with_their_sources(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('log_format = "json"\n')
    arguments = ("node", "start", "--print-config", "--log-level", "debug")
    done = lattica(*arguments, data=tmp_path, environment={"LATTICA_METRICS": "127.0.0.1:0"})
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["log_level"] == "debug"
    for line in (
        'log_level = "debug"  # argument --log-level',
        f'log_format = "json"  # {tmp_path / "config.toml"}',
        'metrics = "127.0.0.1:0"  # environment LATTICA_METRICS',
        "bootstrap = []  # default",
    ):
        assert line in done.stdout.splitlines()
    as_json = json.loads(lattica(*arguments, "--json", data=tmp_path).stdout)
    assert as_json["log_level"] == {"value": "debug", "source": "argument --log-level"}


def test_logs_are_json_lines_and_metrics_are_served(start: Start) -> None:
    from urllib.request import urlopen

    node = start("node", "--metrics", "127.0.0.1:0", "--log-format", "json")
    assert node.process.stderr is not None
    told = json.loads(node.process.stderr.readline())
    while told["event"] != "metrics are served":
        told = json.loads(node.process.stderr.readline())
    with urlopen(f"http://{told['address']}/metrics", timeout=30) as response:
        page = response.read()
    assert b"lattica_peers 0.0" in page
    assert b"lattica_net_connections 0.0" in page


def test_a_metrics_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = lattica("node", "start", *LISTEN, "--metrics", address, data=tmp_path)
    assert done.returncode == 1
    assert address in done.stderr.splitlines()[-1]


def test_the_version_is_printed() -> None:
    import lattica as package

    assert lattica("--version").stdout == f"lattica {package.__version__}\n"
