"""The benches' delayed link in namespaces: the round trip, rate and losses asked for, and our stream over it.

Needs root, network namespaces and TUN.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.slow]

RTT_SECONDS = 0.06
BYTES_A_SECOND = 4e6
TCP_ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as listener:
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        while data := connection.recv(65536):
            connection.sendall(data)
"""
ROUND_TRIPS = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7000)) as stream:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(15):
        started = time.perf_counter()
        stream.sendall(b"x")
        stream.recv(1)
        print(time.perf_counter() - started)
"""
TCP_SINK = """
import socket, sys, time
with socket.create_server((sys.argv[1], 7000)) as listener:
    print("ready", flush=True)
    connection, _ = listener.accept()
    size, started = 0, None
    while data := connection.recv(65536):
        started = started or time.perf_counter()
        size += len(data)
    print(size / (time.perf_counter() - started), flush=True)
"""
TCP_SOURCE = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as stream:
    stream.sendall(bytes(8_000_000))
"""
DATAGRAMS = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for _ in range(1000):
        sender.sendto(bytes(100), (sys.argv[1], 9))
"""

Open = Callable[..., Any]


@pytest.fixture
def open_link(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """`DelayedLink` with this module's round trip and rate, or as asked; skips where there can be none."""
    monkeypatch.syspath_prepend(repository / "tools")
    from delayed_link import DelayedLink

    try:
        with DelayedLink(rtt=0.0, rate=1e9):
            pass
    except OSError as error:
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            raise
        pytest.skip(f"no delayed link: {error}")

    def make(**changed: Any) -> Any:
        return DelayedLink(**({"rtt": RTT_SECONDS, "rate": BYTES_A_SECOND} | changed))

    return make


def started(link: Any, program: str) -> subprocess.Popen[str]:
    """A program on the left, once it has said that it is ready."""
    words = [*link.at("left"), sys.executable, "-c", program, "10.9.0.1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def on_the_right(link: Any, program: str) -> str:
    words = [*link.at("right"), sys.executable, "-c", program, "10.9.0.1"]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_round_trip_is_what_was_asked_for(open_link: Open) -> None:
    with open_link() as link, started(link, TCP_ECHO) as server:
        took = [float(line) for line in on_the_right(link, ROUND_TRIPS).split()]
        server.kill()
    assert RTT_SECONDS <= min(took) <= RTT_SECONDS * 1.25, took


def test_tcp_gets_the_rate_that_was_asked_for_and_no_more(open_link: Open) -> None:
    with open_link(rtt=0.02) as link, started(link, TCP_SINK) as sink:
        on_the_right(link, TCP_SOURCE)
        said, _ = sink.communicate(timeout=60)
    assert BYTES_A_SECOND * 0.5 <= float(said) <= BYTES_A_SECOND * 1.05


def test_the_share_of_packets_that_was_asked_for_is_lost(open_link: Open) -> None:
    with open_link(loss=0.1, queue_bytes=1 << 30) as link:
        on_the_right(link, DATAGRAMS)
    assert 60 <= link.counts["lost"] <= 140
    assert link.counts["dropped"] == 0


def test_a_full_queue_drops(open_link: Open) -> None:
    with open_link(rate=1e4, queue_bytes=5_000) as link:
        on_the_right(link, DATAGRAMS)
    assert link.counts["dropped"] > 900, "128 bytes a packet: room for 39, and for a few that leave meanwhile"


def test_an_interrupted_run_stops_what_runs_at_both_ends(open_link: Open, repository: Path) -> None:
    say_and_stay = (
        f'''{sys.executable} -c "import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)"'''
    )
    words = [sys.executable, str(repository / "tools" / "delayed_link.py"), "--rtt-ms", "1"]
    tool = subprocess.Popen(
        [*words, "--left", say_and_stay, "--right", say_and_stay], stdout=subprocess.PIPE, text=True
    )
    ends: list[int] = []
    try:
        assert tool.stdout is not None
        ends += [int(tool.stdout.readline()) for _ in range(2)]
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(timeout=30) == 128 + signal.SIGTERM
        assert tool.stdout.read() == "", "ends once both ends have closed it"
    finally:
        tool.kill()
        tool.communicate()
    for process in ends:
        assert not Path(f"/proc/{process}").exists()


def test_our_stream_fills_a_long_fat_link_as_raw_tcp_does(open_link: Open, repository: Path) -> None:
    """With the protocol's first window alone, 256 KiB a round trip, it would get an eighth."""
    words = [sys.executable, str(repository / "tools" / "bench.py"), "link", "--only", "lattica,trio"]
    words += ["--rows", "one stream", "--seconds", "5", "--rounds", "1"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=180)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ratio = next(line for line in lines if line.get("ratio") == "lattica / trio" and line["figure"] == "rate")
    assert ratio["at_least"] == 0.8, "the target, which a busy machine may miss"
    assert ratio["value"] >= 0.5, done.stdout
