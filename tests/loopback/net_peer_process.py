"""A peer in a process of its own, for the tests beside it: prints its address, lives until stdin closes.

Arguments: --max-connections N, --refuse PROTOCOL (what its gate keeps out), --more-files N (than it has open
when it starts).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys

import trio

from lattica.errors import StreamError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.net.host import open_host
from lattica.net.identity import Identity


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def raise_value_error(stream: Stream) -> None:
    raise ValueError("a bug in a handler")


async def raise_stream_error(stream: Stream) -> None:
    raise StreamError("a stream that broke under a handler")


async def return_at_once(stream: Stream) -> None:
    await stream.send_all(b"done")


async def read_nothing(stream: Stream) -> None:
    await trio.sleep_forever()


async def read_late(stream: Stream) -> None:
    """Read only after the other side has said so on another stream."""
    await release.wait()
    size = 0
    while data := await stream.receive_some():
        size += len(data)
    await stream.send_all(str(size).encode())


async def let_read(stream: Stream) -> None:
    release.set()


HANDLERS = {
    "/lattica/echo": echo,
    "/lattica/value-error": raise_value_error,
    "/lattica/stream-error": raise_stream_error,
    "/lattica/return": return_at_once,
    "/lattica/hole": read_nothing,
    "/lattica/late": read_late,
    "/lattica/let-read": let_read,
    "/lattica/refused": echo,
}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-connections", type=int, default=512)
    parser.add_argument("--refuse", default="/lattica/refused")
    parser.add_argument("--more-files", type=int)
    arguments = parser.parse_args()

    def gate(peer: PeerId, protocol: str) -> bool:
        return protocol != arguments.refuse

    async with open_host(
        identity=Identity.generate(),
        listen=["/ip4/127.0.0.1/tcp/0"],
        agent="peer-process/1",
        gate=gate,
        max_connections=arguments.max_connections,
    ) as host:
        for protocol, handler in HANDLERS.items():
            host.serve(protocol, handler)
        if arguments.more_files is not None:
            limit = len(os.listdir("/proc/self/fd")) + arguments.more_files
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        print(json.dumps({"address": host.addresses[0]}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


release = trio.Event()
if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    trio.run(main)
