"""The NATs of tools/nat_lab.py do what their kinds say. Needs root, network namespaces, TUN and nftables."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.slow]

PORT = 4001  # that the hosts' sockets are bound to, shared, as hole punching needs
OBSERVER = """
import socket
with socket.create_server(("", 7000)) as listener:
    print("ready", flush=True)
    kept = []
    while True:
        connection, peer = listener.accept()
        connection.sendall(f"{peer[0]}:{peer[1]}\\n".encode())
        kept.append(connection)
"""
# Says where its socket is seen by each observer, reads where to dial, dials from the same port, and says how it went:
# "dialled", "accepted", or "nothing".
PEER = """
import select, socket, sys, time
port, observers = int(sys.argv[1]), sys.argv[2:]
def bound():
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("", port))
    return made
listener = bound()
listener.listen()
kept = []
for observer in observers:
    kept.append(bound())
    started = time.perf_counter()
    kept[-1].connect((observer, 7000))
    took = time.perf_counter() - started
    print(kept[-1].makefile().readline().strip(), took, flush=True)
address, _, target = sys.stdin.readline().strip().rpartition(":")
dialler = bound()
dialler.setblocking(False)
if address:
    dialler.connect_ex((address, int(target)))
deadline = time.monotonic() + float(sys.stdin.readline())
while (left := deadline - time.monotonic()) > 0:
    readable, writable, _ = select.select([listener], [dialler] if address else [], [], left)
    if readable:
        print("accepted", flush=True)
        listener.accept()
        break
    if writable:
        error = dialler.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not error:
            print("dialled", flush=True)
            break
        dialler.close()  # refused: the other side was not there yet, or does not listen
        dialler = bound()
        dialler.setblocking(False)
        dialler.connect_ex((address, int(target)))
else:
    print("nothing", flush=True)
sys.stdin.readline()
"""
KINDS = ["public", "cone", "eim", "sym", "cgnat", "firewall"]

Open = Callable[..., Any]


@pytest.fixture
def open_lab(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """`NatLab`; skips where there can be none."""
    monkeypatch.syspath_prepend(repository / "tools")
    from nat_lab import NatLab

    missing = [program for program in ("nft", "ip", "nsenter") if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        if os.environ.get("CI") == "true":
            raise OSError(f"not root, or without {missing}")
        pytest.skip(f"no lab: needs root and {', '.join(missing or ['what it has'])}")
    return NatLab


class Peer:
    """PEER at a host of the lab."""

    def __init__(self, lab: Any, host: str, *observers: str) -> None:
        addresses = [lab.hosts[name].public for name in observers]
        words = [*lab.hosts[host].at, sys.executable, "-c", PEER, str(PORT), *addresses]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = [self.line().split() for _ in observers]
        self.seen = [where for where, _ in said]
        self.seconds = [float(took) for _, took in said]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def dial(self, where: str, seconds: float = 3.0) -> None:
        self.tell(where)
        self.tell(str(seconds))


def observe(lab: Any, *hosts: str) -> None:
    """Run an observer at each; they end with the lab."""
    for host in hosts:
        words = [*lab.hosts[host].at, sys.executable, "-c", OBSERVER]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_maps_and_filters_as_its_name_says(open_lab: Open, kind: str) -> None:
    with open_lab({"a": kind, "s": "public"}, rtt=0.02) as lab:
        observe(lab, "r", "s")
        peer = Peer(lab, "a", "r", "s")
        stranger = Peer(lab, "s")
        (first, port), second = peer.seen[0].split(":"), peer.seen[1]
        assert first == lab.hosts["a"].public
        assert (peer.seen[0] == second) == (kind != "sym")
        assert (int(port) == PORT) == (kind in ("public", "cone", "firewall"))
        peer.dial("", 1.0)
        stranger.dial(peer.seen[0], 1.0)
        assert peer.line() == ("accepted" if kind == "public" else "nothing")


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(KINDS, 2)), ids="-".join)
def test_both_dial_at_once_and_connect_unless_a_port_cannot_be_known(
    open_lab: Open, pair: tuple[str, str]
) -> None:
    with open_lab({"a": pair[0], "b": pair[1]}, rtt=0.08) as lab:
        observe(lab, "r")
        a, b = Peer(lab, "a", "r"), Peer(lab, "b", "r")
        connects = "sym" not in pair or "public" in pair
        for peer, other in ((a, b), (b, a)):
            peer.dial(other.seen[0], 3.0 if connects else 1.0)
        said = {a.line(), b.line()}
        assert ("nothing" not in said) == connects, said


@pytest.mark.parametrize("kind", ["cone", "eim", "cgnat"])
@pytest.mark.parametrize("hairpin", [False, True])
def test_beside_each_other_the_public_address_works_with_hairpin_only(
    open_lab: Open, kind: str, hairpin: bool
) -> None:
    with open_lab({"a": kind + "+hairpin" * hairpin, "b": "@a"}, rtt=0.02) as lab:
        observe(lab, "r")
        a, b = Peer(lab, "a", "r"), Peer(lab, "b", "r")
        assert a.seen != b.seen
        assert lab.hosts["a"].public == lab.hosts["b"].public == a.seen[0].split(":")[0]
        for peer, other in ((a, b), (b, a)):
            peer.dial(other.seen[0], 3.0 if hairpin else 1.0)
        assert ("nothing" not in {a.line(), b.line()}) == hairpin


def test_two_behind_one_nat_reach_each_other_by_their_own_addresses(open_lab: Open) -> None:
    with open_lab({"a": "sym", "b": "@a"}, rtt=0.02) as lab:
        observe(lab, "r")
        a, b = Peer(lab, "a"), Peer(lab, "b")
        b.dial("")
        a.dial(f"{lab.hosts['b'].address}:{PORT}")
        assert [a.line(), b.line()] == ["dialled", "accepted"]


@pytest.mark.parametrize("kind", ["public", "cgnat"])
def test_a_round_trip_takes_what_was_asked_for(open_lab: Open, kind: str) -> None:
    with open_lab({"a": kind, "s": "public", "t": "public"}, rtt=0.08) as lab:
        observe(lab, "r", "s", "t")
        assert 0.08 <= min(Peer(lab, "a", "r", "s", "t").seconds) < 0.1


def processes() -> dict[int, str]:
    """Every process and its network namespace."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has ended
            found[int(link.parts[2])] = os.readlink(link)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind(
    open_lab: Open, repository: Path, number: signal.Signals
) -> None:
    before = set(processes().values())
    sleepers = "$A sh -c 'echo; exec sleep 600' & $B sh -c 'echo; exec sleep 600'"
    words = [str(repository / "tools" / "nat_lab.py"), "run", "--a", "cgnat", "--", "sh", "-c", sleepers]
    tool = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert tool.stdout is not None
    assert [tool.stdout.readline() for _ in range(2)] == ["\n", "\n"]
    inside = [process for process, space in processes().items() if space not in before]
    assert len(inside) >= 3, "the two that sleep, and the one that carries packets"
    ends = [os.pidfd_open(process) for process in inside]
    tool.send_signal(number)
    for end in ends:
        assert select.select([end], [], [], 30)[0], "it did not end"
        os.close(end)
    tool.communicate(timeout=30)
    assert set(processes().values()) <= before


def test_the_command_line_tells_hosts_by_the_environment(open_lab: Open, repository: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        tool = [sys.executable, str(repository / "tools" / "nat_lab.py")]
        return subprocess.run([*tool, *words], capture_output=True, text=True, check=False, timeout=60)

    done = run(
        "run", "--a", "eim", "--host", "c=@a", "--", "sh", "-c", "$C ip -4 address; echo $C_PUBLIC; exit 7"
    )
    assert done.returncode == 7
    assert "192.168.1.4/24" in done.stdout
    assert done.stdout.splitlines()[-1] == "45.45.1.1"
    for name in KINDS:
        assert name in run("kinds").stdout
    wrong: Mapping[str, str] = {
        "--a=tunnel": "not one of",
        "--b=@c": "no host 'c'",
        "--host=x y=cone": "no name",
    }
    for option, sentence in wrong.items():
        done = run("run", option, "--", "true")
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr
