"""Calls and items per second between two hosts on loopback, in one process; and what frames alone cost."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long each figure is measured."""
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cost of frames, then calls per second and items in MB/s. Both sides share one core."""
    yield from _frames()
    import trio

    results: list[dict[str, Any]] = []
    trio.run(_calls, args.seconds, results)
    yield from results


def _frames() -> Iterator[dict[str, Any]]:
    """Microseconds to encode and frame, and to read and decode, one request."""
    import numpy as np

    from lattica.rpc.call import Item, Request, pack, parse
    from lattica.rpc.framing import FrameReader

    request = Request("greeter.hello", ["x" * 128], 30.0, "00f067aa0ba902b7", False)
    hidden = np.zeros((8, 576), np.float32)
    for name, message in (
        ("128 B", request),
        ("tensor 18 KiB", Item(hidden)),
        ("bytes 256 KiB", Item(bytes(256 * 1024))),
        ("list of 10,000 ints", Item(list(range(10_000)))),
    ):
        wire = b"".join(pack(message))
        reader = FrameReader()

        def read(wire: bytes = wire, reader: FrameReader = reader) -> None:
            reader.feed(wire)
            body = reader.next()
            assert body is not None
            parse(body)

        yield {
            "bench": "rpc.frames",
            "message": name,
            "pack_us": _microseconds(lambda message=message: pack(message)),
            "read_us": _microseconds(read),
        }


def _microseconds(work: Callable[[], object]) -> float:
    """The median of seven short runs."""
    count, took = 1, 0.0
    while took < 0.01:
        count *= 2
        started = time.perf_counter()
        for _ in range(count):
            work()
        took = time.perf_counter() - started
    runs = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(count):
            work()
        runs.append((time.perf_counter() - started) / count)
    return round(statistics.median(runs) * 1e6, 2)


async def _calls(seconds: float, results: list[dict[str, Any]]) -> None:
    import trio

    from lattica.net.host import open_host
    from lattica.net.identity import Identity
    from lattica.rpc import Call, Service
    from lattica.testing import endpoint

    service = Service("bench")

    @service.method
    async def echo(call: Call, value: Any) -> Any:
        return value

    @service.method
    async def items(call: Call, size: int) -> AsyncIterator[bytes]:
        data = bytes(size)
        while True:
            yield data

    listen = ["/ip4/127.0.0.1/tcp/0"]
    async with (
        open_host(identity=Identity.generate(), listen=listen) as server,
        open_host(identity=Identity.generate(), listen=listen) as client,
    ):
        endpoint(server).register(service)
        rpc = endpoint(client)
        await client.connect(server.addresses[0])
        for size in (128, 256 * 1024):
            for callers in (1, 64):
                done = 0

                async def work(data: bytes) -> None:
                    nonlocal done
                    while True:
                        await rpc.call(server.peer_id, "bench.echo", data)
                        done += 1

                with trio.move_on_after(seconds):
                    async with trio.open_nursery() as nursery:
                        for _ in range(callers):
                            nursery.start_soon(work, bytes(size))
                results.append(
                    {
                        "bench": "rpc.calls",
                        "bytes": size,
                        "callers": callers,
                        "calls_per_s": round(done / seconds),
                    }
                )
        for size in (4096, 65536, 1 << 20):
            done = 0
            started = time.perf_counter()
            async with rpc.stream(server.peer_id, "bench.items", size) as stream:
                async for _ in stream:
                    done += size
                    if time.perf_counter() - started > seconds:
                        break
            took = time.perf_counter() - started
            results.append({"bench": "rpc.items", "bytes": size, "MB_per_s": round(done / took / 1e6)})
