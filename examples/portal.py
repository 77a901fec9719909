"""A node without any async: two of them, calls and streams between. Run: python examples/portal.py"""

from __future__ import annotations

from collections.abc import Iterator

import lattica

greeter = lattica.Service("greeter")


@greeter.method
def hello(call: lattica.Call, name: str) -> str:  # a plain function runs in a thread, where it may block
    return f"hello {name}, says {call.local}"


@greeter.method
def count(call: lattica.Call, n: int) -> Iterator[int]:
    yield from range(n)


@greeter.method
async def total(call: lattica.Call) -> int:  # an async one runs in trio, on the node's own thread
    return sum([item async for item in call.items])


def main() -> None:
    config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)
    with lattica.portal(config) as server, lattica.portal(config) as mesh:
        server.rpc.register(greeter)
        mesh.connect(server.addresses[0])

        print(mesh.call(server.peer_id, "greeter.hello", "Ada", timeout=5))

        with mesh.stream(server.peer_id, "greeter.count", 3) as items:
            print("count:", list(items))

        with mesh.stream(server.peer_id, "greeter.total") as stream:
            for number in (1, 2, 39):
                stream.send(number)
            print("total:", stream.result())

        try:
            mesh.call(server.peer_id, "greeter.hello")
        except lattica.RemoteError as error:
            print("refused:", error.text)


if __name__ == "__main__":
    main()
