"""Hosts behind NATs of chosen kinds, and an Internet between them, on one Linux machine.

Needs root, nftables and iproute2; tools/debian-packages --tests installs them.

usage: python tools/nat_lab.py run --a eim --b cone [--host c=@a] [--rtt 80] [--mbit 100] [--loss 0.01] -- COMMAND
       python tools/nat_lab.py kinds

Hosts a and b, further ones by --host, and r, which is always public. COMMAND runs outside of them; in its environment
$A, $B, $R are what a command starts with to run at a host, and $A_ADDRESS, $A_PUBLIC its own and its outer address:

    python tools/nat_lab.py run --a sym --b cone -- sh -c '$R nc -l 9 & sleep 1; echo hello | $A nc -N $R_ADDRESS 9'

This process stands where the Internet would and holds each packet back for as long as the path takes, since not every
kernel has netem. Namespaces have no name and go with their last process, so an interrupted run leaves none behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import namespaces  # tools/namespaces.py
from delayed_link import Way, make_tun, packets  # tools/delayed_link.py
from nat_kinds import KINDS, Place, parse_place, rules  # tools/nat_kinds.py

OBSERVER: Final = "r"  # a public host in every lab
MAX_HOSTS: Final = 100
MTU: Final = 1500
_HOME = "192.168.1"  # the same behind every home router, as it is out there
_CARRIER = "100.64.0"  # RFC 6598
_PUBLIC = "45.45"  # not from the ranges for documentation: some implementations call those private


@dataclass(frozen=True)
class Host:
    """A host of a running lab.

    Attributes:
        at: what a command starts with to run there.
        router: the same for the router nearest to it; empty where it has none.
        address: its own.
        public: the one that others see.
    """

    at: list[str]
    router: list[str]
    address: str
    public: str


class NatLab:
    """A running lab: `with NatLab({"a": "eim", "b": "cone"}) as lab: subprocess.run([*lab.hosts["a"].at, ...])`.

    Args:
        hosts: what `nat_kinds.parse_place` reads, by name. `r`, public, is added.
        rtt: seconds between two hosts that have the Internet between them.
        rate: bytes a second, of each place's way up and of its way down.
        loss: the share of packets lost between two places.

    Raises:
        ValueError: no such kind.
        OSError: not root, or something is missing; the message says what.
    """

    def __init__(
        self,
        hosts: Mapping[str, str],
        *,
        rtt: float = 0.08,
        rate: float = 12.5e6,
        loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        places: dict[str, Place] = {}
        for name, text in {**hosts, OBSERVER: "public"}.items():
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name for a host")
            places[name] = parse_place(text, places)
        if len(places) > MAX_HOSTS:
            raise ValueError(f"more than {MAX_HOSTS} hosts")
        self._settings = {"hosts": dict(hosts), "rtt": rtt, "rate": rate, "loss": loss, "seed": seed}
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> NatLab:
        words = [sys.executable, __file__, "hold", json.dumps(self._settings)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            raise OSError(said.strip().splitlines()[-1] if said.strip() else "the lab ended at once")
        self.hosts = {name: Host(**fields) for name, fields in json.loads(line).items()}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.communicate()  # closes its stdin, which ends it and everything in the lab


# The process in the middle


@dataclass
class _Space:
    """A namespace of the lab, by a descriptor of this process."""

    descriptor: int

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @property
    def at(self) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--"]

    def run(self, command: str, **options: Any) -> None:
        _run([*self.at, *command.split()], **options)


def _run(words: list[str], **options: Any) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


class _Builder:
    """Makes the namespaces. `tuns` are the Internet's ends, by public address; `hosts` is what to tell of each host."""

    def __init__(self) -> None:
        self.tuns: dict[str, int] = {}
        self.hosts: dict[str, dict[str, Any]] = {}
        self.spaces: list[_Space] = []
        self._routers: dict[str, tuple[_Space, str]] = {}  # each host's outermost, and its outer address

    def add(self, name: str, place: Place) -> None:
        number = len(self.hosts) + 1
        kind = KINDS[place.kind]
        if kind.routers == 0:
            public = address = _public(number, 1)
            self._tell(name, self._on_the_internet(public), None, address, public)
            return
        if place.beside:
            router, public = self._routers[place.beside]
        else:
            public = _public(number, 1)
            router = self._on_the_internet(public)
            inner = f"{_CARRIER if kind.routers == 2 else _HOME}.1"
            _make_router(router, kind.translate, inner, public, hairpin=place.hairpin)
        self._routers[name] = router, public
        if kind.routers == 2:
            home, outer = self._space(), f"{_CARRIER}.{number + 1}"
            _plug_in(home, "wan", router, f"lan{number}", f"{outer}/24", f"{_CARRIER}.1")
            _make_router(home, KINDS["cone"].translate, f"{_HOME}.1", outer, hairpin=False)
            router = home
        host = self._space()
        if kind.translate:
            address = f"{_HOME}.{number + 1}"
            _plug_in(host, "eth0", router, f"lan{number}", f"{address}/24", f"{_HOME}.1")
        else:
            address = _public(number, 2)
            _plug_in(host, "eth0", router, f"lan{number}", f"{address}/32", f"{_HOME}.1")
            router.run(f"ip route add {address}/32 dev lan")
            self.tuns[address], public = self.tuns[public], address
        self._tell(name, host, router, address, public)

    def _tell(self, name: str, space: _Space, router: _Space | None, address: str, public: str) -> None:
        router_at = router.at if router else []
        self.hosts[name] = {"at": space.at, "router": router_at, "address": address, "public": public}

    def _space(self) -> _Space:
        namespaces.enter_fresh()
        space = _Space(os.open("/proc/self/ns/net", os.O_RDONLY))
        self.spaces.append(space)
        return space

    def _on_the_internet(self, public: str) -> _Space:
        space = self._space()
        self.tuns[public] = make_tun("wan", f"{public}/32", MTU)
        space.run("ip route add default dev wan")
        return space


def _public(number: int, last: int) -> str:
    return f"{_PUBLIC}.{number}.{last}"


def _plug_in(space: _Space, device: str, router: _Space, port: str, address: str, gateway: str) -> None:
    """Join a namespace to a router's LAN by a cable."""
    router.run(f"ip link add {port} type veth peer name {device} netns {space.path}")
    router.run(f"ip link set dev {port} master lan up")
    space.run(f"ip address add {address} dev {device}")
    space.run(f"ip link set dev {device} up")
    space.run(f"ip route replace {gateway}/32 dev {device}")
    space.run(f"ip route add default via {gateway} dev {device}")


def _make_router(space: _Space, translate: str, inner: str, outer: str, *, hairpin: bool) -> None:
    """Forward between a LAN, a bridge for the cables of its hosts, and `wan`."""
    space.run("ip link add lan type bridge")
    space.run(f"ip address add {inner}/24 dev lan")
    space.run("ip link set dev lan up")
    space.run("tee /proc/sys/net/ipv4/ip_forward", input="1")
    space.run("nft --file -", input=rules(translate, outer, hairpin=hairpin))


class _Internet:
    """Carries packets between the places: each has a way up and a way down, of a quarter of the round trip each."""

    def __init__(self, tuns: Mapping[str, int], *, rtt: float, rate: float, loss: float, seed: int) -> None:
        rng = random.Random(seed)
        self.tuns = {socket_address(address): tun for address, tun in tuns.items()}
        ends = sorted(set(tuns.values()))
        queue_bytes = max(int(rtt * rate), 64 * MTU)

        def ways(loss: float) -> dict[int, Way]:
            return {
                end: Way(delay=rtt / 4, rate=rate, loss=loss, queue_bytes=queue_bytes, rng=rng)
                for end in ends
            }

        self.up, self.down = ways(loss), ways(0.0)

    def take(self, end: int, packet: bytes, now: float) -> None:
        """A packet has left a place."""
        self.up[end].take(packet, now)

    def turn(self, now: float) -> None:
        """Hand on what has come so far. To an address that nobody has, a packet is lost, as on the Internet."""
        for way in self.up.values():
            for packet in way.arrived(now):
                end = self.tuns.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                if end is not None:
                    self.down[end].take(packet, now)
        for end, way in self.down.items():
            for packet in way.arrived(now):
                os.write(end, packet)

    def next_turn(self) -> float:
        """When there will be something to do; inf while nothing is on its way."""
        return min(way.next_arrival for ways in (self.up, self.down) for way in ways.values())


def socket_address(text: str) -> bytes:
    """An IPv4 address as it stands in a packet."""
    return ipaddress.IPv4Address(text).packed


def hold(settings: dict[str, Any]) -> None:
    """Build the lab, say where everything is, carry packets until stdin ends, and stop what runs in it."""
    places: dict[str, Place] = {}
    builder = _Builder()
    for name, text in {**settings.pop("hosts"), OBSERVER: "public"}.items():
        places[name] = parse_place(text, places)
        builder.add(name, places[name])
    internet = _Internet(builder.tuns, **settings)
    print(json.dumps(builder.hosts), flush=True)
    stdin, ends = sys.stdin.fileno(), [*internet.up]
    try:
        while True:
            wait = internet.next_turn() - time.monotonic()
            ready = select.select([stdin, *ends], [], [], min(max(wait, 0.0), 3600.0))[0]
            if stdin in ready and not os.read(stdin, 1):
                return
            for end in ready:
                if end != stdin:
                    for packet in packets(end, MTU):
                        internet.take(end, packet, time.monotonic())
            internet.turn(time.monotonic())
    finally:
        _stop_what_runs_in(builder.spaces)


def _stop_what_runs_in(spaces: list[_Space]) -> None:
    inside = {os.fstat(space.descriptor).st_ino for space in spaces}
    killed = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended
                if (process / "ns/net").stat().st_ino in inside:
                    killed.append(os.pidfd_open(int(process.name)))
                    signal.pidfd_send_signal(killed[-1], signal.SIGKILL)
    for end in killed:
        select.select([end], [], [], 5.0)


# The command line


def run(lab: NatLab, command: list[str]) -> int:
    """Run a command that knows the hosts by its environment; its exit status."""
    with lab:
        environment = dict(os.environ)
        for name, host in lab.hosts.items():
            upper = name.upper()
            environment[upper] = " ".join(host.at)
            environment[f"{upper}_ROUTER"] = " ".join(host.router)
            environment[f"{upper}_ADDRESS"], environment[f"{upper}_PUBLIC"] = host.address, host.public
        with subprocess.Popen(command, env=environment) as process:
            try:
                return process.wait()
            finally:
                process.terminate()


def print_kinds() -> None:
    """A line for each kind, with RFC 4787's words for it."""
    for name, kind in KINDS.items():
        said = [part for part in (kind.mapping, kind.filtering) if part]
        print(f"{name:9} {'; '.join(said) or 'nothing is translated, nothing kept out'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kinds", help="list them")
    holding = commands.add_parser("hold")  # the process in the middle, for NatLab
    holding.add_argument("settings")
    running = commands.add_parser("run", help="build a lab and run a command in it")
    kinds = f"{', '.join(KINDS)}; +hairpin after it; or @HOST: beside that one"
    running.add_argument("--a", default="cone", metavar="KIND", help=kinds)
    running.add_argument("--b", default="cone", metavar="KIND")
    running.add_argument("--host", action="append", default=[], metavar="NAME=KIND", help="one more")
    running.add_argument("--rtt", type=float, default=80.0, metavar="MS", help="between two places [80]")
    running.add_argument("--mbit", type=float, default=100.0, help="a second, of each place, each way [100]")
    running.add_argument("--loss", type=float, default=0.0, help="share of packets [0]")
    running.add_argument("--seed", type=int, default=0, help="of the losses")
    running.add_argument("program", nargs="+", metavar="COMMAND")
    args = parser.parse_args()
    if args.command == "kinds":
        print_kinds()
    elif args.command == "hold":
        hold(json.loads(args.settings))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        more = dict(text.split("=", 1) if "=" in text else (text, "") for text in args.host)
        try:
            lab = NatLab(
                {"a": args.a, "b": args.b, **more},
                rtt=args.rtt / 1e3,
                rate=args.mbit * 1e6 / 8,
                loss=args.loss,
                seed=args.seed,
            )
            sys.exit(run(lab, args.program))
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            sys.exit(f"no lab: {error}")


if __name__ == "__main__":
    main()
