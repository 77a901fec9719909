"""A long, narrow or lossy link between two network namespaces, and commands run at its two ends. Needs root.

usage: python tools/delayed_link.py [--rtt-ms 100] [--mbit 200] [--loss 0.0] --left COMMAND --right COMMAND

Each end is a namespace with loopback and a TUN device: 10.9.0.1 on the left, 10.9.0.2 on the right. This process
stands between the two and holds each packet back for as long as the link says, since not every kernel has netem. It
ends when the right's command does, with its exit status; the left's is stopped then. Namespaces and devices have no
name and go with their last process, so an interrupted run leaves none behind.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import select
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import namespaces  # tools/namespaces.py

End = Literal["left", "right"]
ADDRESSES: dict[End, str] = {"left": "10.9.0.1", "right": "10.9.0.2"}

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_KERNEL_QUEUE_PACKETS = 10_000  # so that the kernel never drops what our own queue has room for
_BATCH_PACKETS = 64  # read from one end before the other has its turn
# What this process may be late by and still make up for: else each time that it is not scheduled would cost the link
# some of its rate.
_CATCH_UP_SECONDS = 0.002


class DelayedLink:
    """A running link: `with DelayedLink(rtt=0.1, rate=25e6) as link: subprocess.run([*link.at("right"), ...])`.

    Args:
        rtt: seconds, half of it each way.
        rate: bytes a second, each way.
        loss: the share of packets lost, each way.
        queue_bytes: what a router would hold each way before it drops; None: one rtt's worth.

    Raises:
        OSError: not root, or this kernel has no namespaces or no TUN; the message says which.
    """

    def __init__(
        self,
        *,
        rtt: float,
        rate: float,
        loss: float = 0.0,
        queue_bytes: int | None = None,
        mtu: int = 1500,
        seed: int = 0,
    ) -> None:
        self._settings = {
            "delay": rtt / 2,
            "rate": rate,
            "loss": loss,
            "queue_bytes": queue_bytes if queue_bytes is not None else max(int(rtt * rate), 16 * mtu),
            "mtu": mtu,
            "seed": seed,
        }
        self._places: dict[str, str] = {}
        self.counts: dict[str, int] = {}  # forwarded, lost and dropped packets; known after the block

    def __enter__(self) -> DelayedLink:
        words = [sys.executable, __file__, "--hold", json.dumps(self._settings)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            raise OSError(said.strip().splitlines()[-1] if said.strip() else "the link ended at once")
        self._places = json.loads(line)
        return self

    def __exit__(self, *exc_info: object) -> None:
        said, _ = self._process.communicate()  # closes its stdin, which ends it
        self.counts = json.loads(said) if said else {}

    def at(self, end: End) -> list[str]:
        """What a command starts with to run at this end."""
        return ["nsenter", f"--net={self._places[end]}", "--"]


class Way:
    """One direction of the link: packets leave in order, at the link's rate, and arrive after its delay.

    Does no I/O and reads no clock: `now` is in seconds, from any clock that goes forward.
    """

    def __init__(
        self, *, delay: float, rate: float, loss: float, queue_bytes: int, rng: random.Random
    ) -> None:
        self._delay, self._rate, self._loss, self._queue_bytes = delay, rate, loss, queue_bytes
        self._rng = rng
        self._held: deque[tuple[float, bytes]] = deque()  # when each arrives
        self._free_at = 0.0  # when the last of them will have left
        self.lost = self.dropped = 0

    def take(self, packet: bytes, now: float) -> None:
        """A packet has come to the near end."""
        if self._rng.random() < self._loss:
            self.lost += 1
            return
        leaves = max(self._free_at, now - _CATCH_UP_SECONDS)
        if (leaves - now) * self._rate + len(packet) > self._queue_bytes:
            self.dropped += 1
            return
        self._free_at = leaves + len(packet) / self._rate
        self._held.append((max(self._free_at, now) + self._delay, packet))

    def arrived(self, now: float) -> Iterator[bytes]:
        """What is at the far end by now and was not handed over before."""
        while self._held and self._held[0][0] <= now:
            yield self._held.popleft()[1]

    @property
    def next_arrival(self) -> float:
        """When `arrived` has something to give; inf while nothing is on its way."""
        return self._held[0][0] if self._held else float("inf")


def hold(settings: dict[str, float]) -> None:
    """Make both ends, say where they are, and carry packets until stdin ends."""
    mtu, seed = int(settings.pop("mtu")), int(settings.pop("seed"))
    tuns, places = [], {}
    for end, other in (("left", "right"), ("right", "left")):
        tun, space = _make_end(ADDRESSES[end], ADDRESSES[other], mtu)
        tuns.append(tun)
        places[end] = f"/proc/{os.getpid()}/fd/{space}"
    rng = random.Random(seed)
    queue_bytes = int(settings.pop("queue_bytes"))
    ways = {  # by the descriptors that a packet is read from and written to
        ends: Way(queue_bytes=queue_bytes, rng=rng, **settings) for ends in (tuple(tuns), tuple(tuns[::-1]))
    }
    forwarded = 0
    print(json.dumps(places), flush=True)
    stdin = sys.stdin.fileno()
    while True:
        wait = min(way.next_arrival for way in ways.values()) - time.monotonic()
        ready = select.select([stdin, *tuns], [], [], min(max(wait, 0.0), 3600.0))[0]
        if stdin in ready and not os.read(stdin, 1):
            break
        for (source, target), way in ways.items():
            if source in ready:
                for packet in packets(source, mtu):
                    way.take(packet, time.monotonic())
            for packet in way.arrived(time.monotonic()):
                os.write(target, packet)
                forwarded += 1
    counts = {name: sum(getattr(way, name) for way in ways.values()) for name in ("lost", "dropped")}
    print(json.dumps({"forwarded": forwarded, **counts}), flush=True)


def packets(tun: int, mtu: int) -> Iterator[bytes]:
    """What has come to a TUN device, as many as one turn takes."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_BATCH_PACKETS):
            yield os.read(tun, mtu)


def make_tun(name: str, address: str, mtu: int) -> int:
    """A TUN device in this process's namespace, by its descriptor; `address` as `ip address add` reads it."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    for words in (
        f"ip address add {address} dev {name}",
        f"ip link set dev {name} mtu {mtu} txqueuelen {_KERNEL_QUEUE_PACKETS} up",
    ):
        subprocess.run(words.split(), check=True, stdout=subprocess.DEVNULL)
    return tun


def _make_end(own: str, other: str, mtu: int) -> tuple[int, int]:
    """A fresh namespace with a TUN device: the descriptors of the device and of the namespace."""
    namespaces.enter_fresh()
    return make_tun("wire", f"{own} peer {other}", mtu), os.open("/proc/self/ns/net", os.O_RDONLY)


def run(link: DelayedLink, left: Sequence[str], right: Sequence[str]) -> int:
    """Run a command at each end until the right's is done; its exit status."""
    with link, subprocess.Popen([*link.at("left"), *left]) as stays:
        try:
            return subprocess.run([*link.at("right"), *right], check=False).returncode
        finally:
            stays.terminate()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rtt-ms", type=float, default=100.0)
    parser.add_argument("--mbit", type=float, default=200.0, help="a second, each way")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets, each way")
    parser.add_argument(
        "--queue-bytes", type=int, help="each way, before packets are dropped [one rtt's worth]"
    )
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0, help="of the losses")
    parser.add_argument("--left", metavar="COMMAND", help="run at 10.9.0.1, stopped when the right's is done")
    parser.add_argument("--right", metavar="COMMAND", help="run at 10.9.0.2")
    parser.add_argument("--hold", help=argparse.SUPPRESS)  # the process in the middle, for DelayedLink
    args = parser.parse_args()
    if args.hold:
        hold(json.loads(args.hold))
        return
    if not (args.left and args.right):
        parser.error("--left and --right say what runs at the two ends")
    link = DelayedLink(
        rtt=args.rtt_ms / 1e3,
        rate=args.mbit * 1e6 / 8,
        loss=args.loss,
        queue_bytes=args.queue_bytes,
        mtu=args.mtu,
        seed=args.seed,
    )
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # stop what runs at the ends, too
    try:
        sys.exit(run(link, shlex.split(args.left), shlex.split(args.right)))
    except OSError as error:
        sys.exit(f"no delayed link: {error}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
