"""What a call costs through `lattica.portal` and `lattica.aio` beside a call in trio, to a server in a process."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

PAYLOAD = b"x" * 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many calls."""
    parser.add_argument("--calls", type=int, default=2000, help="a figure, of each face in each round [2000]")
    parser.add_argument("--rounds", type=int, default=5, help="the faces take turns [5]")
    parser.add_argument("--callers", type=int, default=64, help="at once, where there are many [64]")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Medians over rounds, in microseconds a call or item: by the clock, and of this process's CPU."""
    faces = {"trio": in_trio, "portal": in_threads, "asyncio": in_asyncio}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, "the server did not start"
        for _ in range(args.rounds):
            for face, measure in faces.items():
                for work, *figures in measure(address, args.calls, args.callers):
                    found.setdefault((work, face), []).append((figures[0], figures[1]))
        server.kill()
    for (work, face), figures in found.items():
        wall, cpu = (median(column) for column in zip(*figures, strict=True))
        native = [median(column) for column in zip(*found[work, "trio"], strict=True)]
        yield {
            "bench": "portal",
            "work": work,
            "face": face,
            "microseconds": round(wall, 1),
            "cpu_microseconds": round(cpu, 1),
            "over_trio": round(wall / native[0], 2),
            "cpu_over_trio": round(cpu / native[1], 2),
        }


Figure = tuple[str, float, float]  # what was done, seconds by the clock and of CPU


class Watch:
    """Microseconds for each of so many pieces of work."""

    def __init__(self, work: str, count: int) -> None:
        self._work = work
        self._count = count
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def stop(self) -> Figure:
        scale = 1e6 / self._count
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return self._work, wall * scale, cpu * scale


def config() -> Any:
    import lattica

    return lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)


async def figures(node: Any, address: str, count: int, callers: int, gather: Any) -> list[Figure]:
    """The same program for both kinds of async."""
    peer = await node.connect(address)

    async def calls(count: int) -> None:
        for _ in range(count):
            await node.rpc.call(peer, "bench.echo", PAYLOAD)

    await calls(100)
    watch = Watch("calls, one caller", count)
    await calls(count)
    found = [watch.stop()]
    watch = Watch(f"calls, {callers} callers", count // callers * callers)
    await gather(calls, count // callers, callers)
    found.append(watch.stop())
    async with node.rpc.stream(peer, "bench.items", count) as items:
        watch = Watch("items of a stream", count)
        async for _ in items:
            pass
        found.append(watch.stop())
    return found


def in_trio(address: str, count: int, callers: int) -> list[Figure]:
    """On the native node."""
    import trio

    import lattica

    async def gather(work: Callable[[int], Awaitable[None]], count: int, callers: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(callers):
                nursery.start_soon(work, count)

    async def main() -> list[Figure]:
        async with lattica.open_node(config()) as node:
            return await figures(node, address, count, callers, gather)

    return trio.run(main)


def in_asyncio(address: str, count: int, callers: int) -> list[Figure]:
    """Through `lattica.aio`."""
    import lattica

    async def gather(work: Callable[[int], Awaitable[None]], count: int, callers: int) -> None:
        await asyncio.gather(*(work(count) for _ in range(callers)))

    async def main() -> list[Figure]:
        async with lattica.aio.open_node(config()) as node:
            return await figures(node, address, count, callers, gather)

    return asyncio.run(main())


def in_threads(address: str, count: int, callers: int) -> list[Figure]:
    """Through `lattica.portal`, a thread for each caller."""
    import lattica

    with lattica.portal(config()) as mesh, ThreadPoolExecutor(callers) as threads:
        peer = mesh.connect(address)

        def calls(count: int) -> None:
            for _ in range(count):
                mesh.call(peer, "bench.echo", PAYLOAD)

        calls(100)
        watch = Watch("calls, one caller", count)
        calls(count)
        found = [watch.stop()]
        watch = Watch(f"calls, {callers} callers", count // callers * callers)
        list(threads.map(calls, [count // callers] * callers))
        found.append(watch.stop())
        with mesh.stream(peer, "bench.items", count) as items:
            watch = Watch("items of a stream", count)
            for _ in items:
                pass
            found.append(watch.stop())
    return found


async def serve() -> None:
    """The other process: prints its address, and serves until it is killed."""
    import trio

    import lattica

    service = lattica.Service("bench")

    @service.method
    async def echo(call: lattica.Call, data: bytes) -> bytes:
        return data

    @service.method
    async def items(call: lattica.Call, count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield PAYLOAD

    async with lattica.open_node(config()) as node:
        node.rpc.register(service)
        print(node.addresses[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    import trio

    trio.run(serve)
