"""Two hosts on loopback: TCP, Noise and Yamux to a usable connection, and one round trip on it."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--repeat", type=int, default=20)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the median times; stock py-libp2p's dial never takes less than 250 ms."""
    import trio

    from lattica.net.host import open_host
    from lattica.net.identity import Identity

    async def measure() -> tuple[list[float], list[float]]:
        connects, pings = [], []
        listen = ["/ip4/127.0.0.1/tcp/0"]
        async with (
            open_host(identity=Identity.generate(), listen=listen) as one,
            open_host(identity=Identity.generate(), listen=listen) as two,
        ):
            for _ in range(args.repeat):
                started = trio.current_time()
                peer = await two.connect(one.addresses[0])
                connects.append(trio.current_time() - started)
                pings.append(await two.ping(peer))
                await two.disconnect(peer)
        return connects, pings

    connects, pings = trio.run(measure)
    yield {
        "bench": "connect",
        "repeat": args.repeat,
        "connect_ms": round(statistics.median(connects) * 1e3, 2),
        "connect_ms_worst": round(max(connects) * 1e3, 2),
        "ping_ms": round(statistics.median(pings) * 1e3, 3),
    }
