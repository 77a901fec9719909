"""The yardstick: raw TCP under trio, neither encrypted nor multiplexed; a connection for each stream."""

from __future__ import annotations

import sys

import _lines as lines
import _trio_jobs as jobs
import trio


async def handle(stream: trio.SocketStream) -> None:
    async with stream:
        kind = await stream.receive_some(1)
        await {b"e": jobs.echo_stream, b"b": jobs.count_bytes}[kind](stream)


async def serve(host: str) -> None:
    listeners = await trio.open_tcp_listeners(0, host=host)
    lines.serve_state()
    lines.say({"address": "{}:{}".format(*listeners[0].socket.getsockname())})
    await trio.serve_listeners(handle, listeners)


class Client:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._where = host, int(port)

    async def _stream(self, kind: bytes) -> trio.SocketStream:
        stream = await trio.open_tcp_stream(*self._where)
        await stream.send_all(kind)
        return stream

    async def bulk(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        await jobs.send_bulk(await self._stream(b"b"), tally)
        return tally.result()

    async def echo(self, job: lines.Job) -> lines.Result:
        return await jobs.echo_on([await self._stream(b"e") for _ in range(job["callers"])], job)

    async def connect(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(0)
        for _ in range(job["count"]):
            with tally.piece():
                stream = await self._stream(b"e")
                await stream.send_all(b"x")
                await stream.receive_some()
            await stream.aclose()
        return tally.result()


async def client(address: str) -> None:
    await jobs.work(Client(address))


if __name__ == "__main__":
    trio.run({"serve": serve, "client": client}[sys.argv[1]], sys.argv[2])
