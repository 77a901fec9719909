"""grpc.aio over an insecure channel: bytes through generic handlers, so that no Protocol Buffers cost is counted."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

import _lines as lines
import grpc

OPTIONS = [
    ("grpc.max_send_message_length", lines.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", lines.MAX_MESSAGE_BYTES),
]


async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return request


async def items(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    data = bytes(int(request))
    while True:
        yield data


async def serve(host: str) -> None:
    server = grpc.aio.server(options=OPTIONS)
    methods = {
        "echo": grpc.unary_unary_rpc_method_handler(echo),
        "items": grpc.unary_stream_rpc_method_handler(items),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    port = server.add_insecure_port(f"{host}:0")
    await server.start()
    lines.serve_state()
    lines.say({"address": f"{host}:{port}"})
    await server.wait_for_termination()


class Client:
    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._echo = self._channel.unary_unary("/bench/echo")
        self._items = self._channel.unary_stream("/bench/items")

    async def calls(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        data = bytes(job["bytes"])
        await asyncio.gather(*(self._call(tally, data) for _ in range(job["callers"])))
        return tally.result()

    async def _call(self, tally: lines.Tally, data: bytes) -> None:
        while tally.open():
            with tally.piece():
                reply = await self._echo(data)
            assert len(reply) == len(data)

    async def items(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        await self._read_items(tally, job["bytes"])
        return tally.result()

    async def _read_items(self, tally: lines.Tally, size: int) -> None:
        call = self._items(str(size).encode())
        async for item in call:
            tally.bytes += len(item)
            if not tally.open():
                break
        call.cancel()

    async def beside_receiving(self, job: lines.Job) -> lines.Result:
        alone = await self.calls({**job, "callers": 1})
        bulk, calls = lines.Tally(job["seconds"]), lines.Tally(job["seconds"])
        await asyncio.gather(self._read_items(bulk, 65536), self._call(calls, bytes(job["bytes"])))
        return {**calls.result(), "alone": alone, "bulk": bulk.result()}

    async def connect(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(0)
        for _ in range(job["count"]):
            with tally.piece():
                # Channels of one process share connections unless told otherwise.
                channel = grpc.aio.insecure_channel(
                    self._address, options=[*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
                )
                await channel.unary_unary("/bench/echo")(b"x")
            await channel.close()
        return tally.result()


async def client(address: str) -> None:
    contestant = Client(address)
    lines.say({"ready": True})
    while (job := await asyncio.to_thread(lines.next_job)) is not None:
        lines.say(await getattr(contestant, job["work"])(job))
    os._exit(0)


if __name__ == "__main__":
    asyncio.run({"serve": serve, "client": client}[sys.argv[1]](sys.argv[2]))
