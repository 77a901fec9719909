"""A node in a process of its own that can be asked what it is doing, for the tests that try to break it.

Prints its address as one JSON line and lives until its stdin closes. Everything else is asked by calls to its
service `break`: the tests wait on what it counts, not on the clock.

usage: break_node.py [--data FOLDER] [--listen ADDRESS] [--bootstrap ADDRESS] [--set MODULE:NAME=SECONDS]...
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import logging
import os
import socket
import stat
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import trio

import lattica

KIB, MIB = 1024, 1024 * 1024


class Counts:
    """How often something has happened here, and when it last did. Others can wait for a number."""

    def __init__(self) -> None:
        self.number: Counter[str] = Counter()
        self.last: dict[str, float] = {}
        self._lot = trio.lowlevel.ParkingLot()

    def add(self, what: str) -> None:
        self.number[what] += 1
        self.last[what] = time.monotonic()  # one clock for all processes of a machine
        self._lot.unpark_all()

    async def reach(self, what: str, number: int) -> float:
        """When the number was reached, on the machine's monotonic clock (if nothing was counted since)."""
        while self.number[what] < number:
            await self._lot.park()
        return self.last.get(what, 0.0)


def settled_memory() -> int:
    """Resident bytes of this process once everything that is garbage has been given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_descriptors() -> tuple[int, int]:
    """How many descriptors are open here, and how many of those are sockets."""
    every = sockets = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            mode = os.stat(f"/proc/self/fd/{name}").st_mode
        except OSError:  # the descriptor that listed them
            continue
        every += 1
        sockets += stat.S_ISSOCK(mode)
    return every, sockets


def service(node: lattica.Node) -> lattica.Service:
    counts = Counts()
    gates: dict[str, trio.Event] = {}
    offered = lattica.Service("break")
    traced = 0

    def gate(name: str) -> trio.Event:
        return gates.setdefault(name, trio.Event())

    # What it is doing

    @offered.method
    async def reach(call: lattica.Call, what: str, number: int) -> float:
        return await counts.reach(what, number)

    @offered.method
    async def count(call: lattica.Call, what: str) -> int:
        return counts.number[what]

    @offered.method
    async def state(call: lattica.Call) -> dict[str, int]:
        descriptors, sockets = open_descriptors()
        return {
            "descriptors": descriptors,
            "sockets": sockets,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "threads": threading.active_count(),
            "peers": len(node.peers()),
        }

    @offered.method
    async def memory(call: lattica.Call) -> int:
        return settled_memory()

    @offered.method
    async def trace_memory(call: lattica.Call) -> int:
        """The most bytes that Python's allocators held since this was asked last, above those that they held then."""
        nonlocal traced
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        now, peak = tracemalloc.get_traced_memory()
        above, traced = peak - traced, now
        tracemalloc.reset_peak()
        return above

    @offered.method
    async def set_gate(call: lattica.Call, name: str) -> None:
        gate(name).set()

    # What can be asked of it

    @offered.method
    async def echo(call: lattica.Call, value: Any) -> Any:
        return value

    @offered.method
    async def size(call: lattica.Call, value: bytes) -> int:
        return len(value)

    @offered.method
    async def sleep(call: lattica.Call, seconds: float) -> None:
        counts.add("sleeping")
        await trio.sleep(seconds)
        counts.add("slept")

    @offered.method
    def block(call: lattica.Call, seconds: float) -> None:
        """A plain function, which holds its thread."""
        trio.from_thread.run_sync(counts.add, "blocking")
        time.sleep(seconds)
        trio.from_thread.run_sync(counts.add, "blocked")

    @offered.method
    async def hold(call: lattica.Call, name: str = "hold") -> None:
        """Never answers; counts that it began, and that it was cancelled."""
        counts.add(f"{name} began")
        try:
            await trio.sleep_forever()
        finally:
            counts.add(f"{name} ended")

    @offered.method
    async def meet(call: lattica.Call, number: int, total: int) -> int:
        """Answers once `total` callers are waiting here at once."""
        counts.add("met")
        await counts.reach("met", total)
        return number

    @offered.method
    async def fail(call: lattica.Call, text: str) -> None:
        counts.add("failed")
        raise ValueError(text)

    @offered.method
    async def fail_after(call: lattica.Call, number: int, text: str) -> AsyncIterator[int]:
        counts.add("failed half way")
        for item in range(number):
            yield item
        raise ValueError(text)

    @offered.method
    async def produce(
        call: lattica.Call, number: int, size_bytes: int, name: str = "produce"
    ) -> AsyncIterator[tuple[int, bytes]]:
        """`number` numbered items; counts how far it came, and that it ended."""
        body = bytes(size_bytes)
        counts.add(f"{name} began")
        try:
            for item in range(number):
                counts.add(f"{name} item")
                yield item, body
        finally:
            counts.add(f"{name} ended")

    @offered.method
    async def take_late(call: lattica.Call, name: str) -> list[int]:
        """Reads one item, then none before `set_gate(name)`; gives the numbers of all."""
        numbers: list[int] = []
        async for number, _ in call.items:
            numbers.append(number)
            counts.add(f"{name} taken")
            await gate(name).wait()
        return numbers

    @offered.method
    async def drain(call: lattica.Call) -> int:
        """Reads what comes as fast as it can; gives how many bytes that were."""
        total = 0
        async for item in call.items:
            total += len(item)
            counts.add("drained")
        return total

    # What it can be asked to do to others

    @offered.method
    async def ping(call: lattica.Call, peer: str) -> str:
        """ "pong", or why there was none."""
        try:
            await node.host.ping(lattica.PeerId.parse(peer))
        except lattica.LatticaError as error:
            return f"no ping: {error}"
        return "pong"

    @offered.method
    async def read_one_and_hold(call: lattica.Call, address: str, name: str) -> None:
        """Opens an endless stream of the node at `address`, reads an item, and keeps the stream."""
        peer = await node.connect(address)
        async with node.rpc.stream(peer, "break.produce", 1 << 40, KIB, name) as items:
            await items.__anext__()
            await trio.sleep_forever()

    @offered.method
    async def call_hold(call: lattica.Call, address: str, name: str, seconds: float) -> None:
        """Calls `hold` of the node at `address`, with a timeout."""
        peer = await node.connect(address)
        await node.rpc.call(peer, "break.hold", name, timeout=seconds)

    return offered


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--listen", default="/ip4/127.0.0.1/tcp/0")
    parser.add_argument("--bootstrap", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="MODULE:NAME=SECONDS")
    arguments = parser.parse_args()
    for setting in arguments.set:
        place, _, value = setting.partition("=")
        module, _, name = place.partition(":")
        loaded = importlib.import_module(module)
        assert isinstance(getattr(loaded, name), int | float), (
            place
        )  # a renamed interval must not go unnoticed
        setattr(loaded, name, float(value))
    config = lattica.NodeConfig(
        listen=[arguments.listen], bootstrap=arguments.bootstrap, data_dir=arguments.data, services=False
    )
    async with lattica.open_node(config) as node:
        node.rpc.register(service(node))
        print(json.dumps({"address": node.addresses[0]}), flush=True)
        # Not in a thread: this process' own threads are counted.
        stdin = socket.socket(fileno=os.dup(0))
        stdin.setblocking(False)
        await trio.lowlevel.wait_readable(stdin)
        stdin.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main)
