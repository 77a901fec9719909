"""Two nodes in one process, calls of every shape between them. Run: python examples/greeter.py"""

from __future__ import annotations

from collections.abc import AsyncIterator

import trio

import lattica

greeter = lattica.Service("greeter")


@greeter.method
async def hello(call: lattica.Call, name: str) -> str:
    return f"hello {name}, says {call.local}"


@greeter.method
async def count(call: lattica.Call, n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


@greeter.method
async def total(call: lattica.Call) -> int:
    return sum([item async for item in call.items])


async def main() -> None:
    config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)
    async with lattica.open_node(config) as server, lattica.open_node(config) as client:
        server.rpc.register(greeter)
        await client.connect(server.addresses[0])

        print(await client.rpc.call(server.peer_id, "greeter.hello", "Ada", timeout=5))

        async with client.rpc.stream(server.peer_id, "greeter.count", 3) as items:
            print("count:", [item async for item in items])

        async with client.rpc.stream(server.peer_id, "greeter.total") as stream:
            for number in (1, 2, 39):
                await stream.send(number)
            await stream.finish()
            print("total:", await stream.result())

        try:
            await client.rpc.call(server.peer_id, "greeter.hello")
        except lattica.RemoteError as error:
            print("refused:", error.text)


if __name__ == "__main__":
    trio.run(main)
