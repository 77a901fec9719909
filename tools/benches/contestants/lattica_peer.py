"""Ours: calls, items and raw streams through the public API and `net`, encrypted, from the checkout beside it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import _lines as lines
import _trio_jobs as jobs
import trio

import lattica
from lattica.ids import PeerId
from lattica.net.api import Stream

ECHO = "/bench/echo/1.0.0"
BULK = "/bench/bulk/1.0.0"

bench = lattica.Service("bench")


@bench.method
async def echo(call: lattica.Call, value: bytes) -> bytes:
    return value


@bench.method
async def items(call: lattica.Call, size: int) -> AsyncIterator[bytes]:
    data = bytes(size)
    while True:
        yield data


def config(host: str) -> lattica.NodeConfig:
    return lattica.NodeConfig(listen=[f"/ip4/{host}/tcp/0"], data_dir=None)


async def serve(host: str) -> None:
    async with lattica.open_node(config(host)) as node:
        node.rpc.register(bench)
        node.host.serve(ECHO, jobs.echo_stream)
        node.host.serve(BULK, jobs.count_bytes)
        token = trio.lowlevel.current_trio_token()

        def state() -> dict[str, int]:
            return {
                "tasks": trio.lowlevel.current_statistics().tasks_living,
                "peers": len(node.peers()),
            }

        lines.serve_state(lambda: trio.from_thread.run_sync(state, trio_token=token))
        lines.say({"address": node.addresses[0]})
        await trio.sleep_forever()


class Client:
    """One node and its server."""

    def __init__(self, node: lattica.Node, server: PeerId) -> None:
        self._node, self._server = node, server

    async def calls(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        async with trio.open_nursery() as nursery:
            for _ in range(job["callers"]):
                nursery.start_soon(self._call, tally, bytes(job["bytes"]))
        return tally.result()

    async def _call(self, tally: lines.Tally, data: bytes) -> None:
        while tally.open():
            with tally.piece():
                reply = await self._node.rpc.call(self._server, "bench.echo", data)
            assert len(reply) == len(data)

    async def items(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        await self._read_items(tally, job["bytes"])
        return tally.result()

    async def _read_items(self, tally: lines.Tally, size: int) -> None:
        async with self._node.rpc.stream(self._server, "bench.items", size) as stream:
            async for item in stream:
                tally.bytes += len(item)
                if not tally.open():
                    break

    async def bulk(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        await self._send_bulk(tally)
        return tally.result()

    async def _send_bulk(self, tally: lines.Tally) -> None:
        await jobs.send_bulk(await self._stream(BULK), tally)

    async def beside_sending(self, job: lines.Job) -> lines.Result:
        """A caller alone, then one beside a raw stream that fills the same connection."""
        return await self._beside(job, self._send_bulk)

    async def beside_receiving(self, job: lines.Job) -> lines.Result:
        """The same beside a stream of items that comes the other way."""
        return await self._beside(job, lambda tally: self._read_items(tally, 65536))

    async def _beside(
        self, job: lines.Job, saturate: Callable[[lines.Tally], Awaitable[None]]
    ) -> lines.Result:
        alone = await self.calls({**job, "callers": 1})
        bulk, calls = lines.Tally(job["seconds"]), lines.Tally(job["seconds"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(saturate, bulk)
            await self._call(calls, bytes(job["bytes"]))
        return {**calls.result(), "alone": alone, "bulk": bulk.result()}

    async def echo(self, job: lines.Job) -> lines.Result:
        streams = [await self._stream(ECHO) for _ in range(job["callers"])]
        return await jobs.echo_on(streams, job)

    async def _stream(self, protocol: str) -> Stream:
        return await self._node.host.open_stream(self._server, [protocol])

    async def connect(self, job: lines.Job) -> lines.Result:
        """Dial, one call, hang up; as often as asked."""
        await self._node.host.disconnect(self._server)
        tally = lines.Tally(0)
        for _ in range(job["count"]):
            with tally.piece():
                await self._node.connect(job["address"])
                await self._node.rpc.call(self._server, "bench.echo", b"")
            await self._node.host.disconnect(self._server)
        await self._node.connect(job["address"])
        return tally.result()

    async def visitors(self, job: lines.Job) -> lines.Result:
        """Short-lived peers, one after another: a node each that connects, calls, and goes.

        Every other one goes without closing its streams; every third leaves a stream of items half read.
        """
        tally = lines.Tally(0)
        for number in range(job["count"]):
            with tally.piece():
                async with lattica.open_node(lattica.NodeConfig(listen=[], data_dir=None)) as node:
                    peer = await node.connect(job["address"])
                    assert await node.rpc.call(peer, "bench.echo", b"hello") == b"hello"
                    if number % 2:
                        stream = await node.host.open_stream(peer, [ECHO])
                        await stream.send_all(b"left open")
                    if number % 3 == 0:
                        async with node.rpc.stream(peer, "bench.items", 4096) as some:
                            async for _ in some:
                                break
        return tally.result()

    async def mixed(self, job: lines.Job) -> lines.Result:
        """Small and large calls, items, raw streams and calls cancelled in the middle, all at once."""
        tally = lines.Tally(job["seconds"])

        async def cancelled() -> None:
            while tally.open():
                with trio.move_on_after(0.002):
                    await self._node.rpc.call(self._server, "bench.echo", bytes(1 << 20))
                await trio.sleep(0.01)

        async def short_streams() -> None:
            while tally.open():
                tally_of_one = lines.Tally(0.05)
                await self._send_bulk(tally_of_one)
                await self._read_items(lines.Tally(0.05), 65536)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(self._call, tally, bytes(128))
            for _ in range(2):
                nursery.start_soon(self._call, tally, bytes(256 * 1024))
            nursery.start_soon(cancelled)
            nursery.start_soon(short_streams)
        return tally.result()

    async def crowd(self, job: lines.Job) -> lines.Result:
        """Nodes that connect to the server and stay, in this process, until the bench goes."""
        stack = AsyncExitStack()
        for _ in range(job["count"]):
            node = await stack.enter_async_context(
                lattica.open_node(lattica.NodeConfig(listen=[], data_dir=None))
            )
            await node.connect(job["address"])
        self._crowd = stack
        return {"connected": job["count"]}


async def client(address: str) -> None:
    async with lattica.open_node(config("127.0.0.1")) as node:
        await jobs.work(Client(node, await node.connect(address)))


if __name__ == "__main__":
    trio.run({"serve": serve, "client": client}[sys.argv[1]], sys.argv[2])
