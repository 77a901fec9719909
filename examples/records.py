"""Small signed facts that the swarm keeps: a worker announces itself, another peer finds it and calls it.

usage: python examples/records.py
"""

from __future__ import annotations

import json

import trio

import lattica

KEY = "workers/resize"  # what workers of one kind announce themselves under
worker = lattica.Service("resize")


@worker.method
async def half(call: lattica.Call, width: int, height: int) -> list[int]:
    return [width // 2, height // 2]


async def main() -> None:
    listen = ["/ip4/127.0.0.1/tcp/0"]
    async with lattica.open_node(lattica.NodeConfig(listen=listen)) as meeting_point:
        config = lattica.NodeConfig(listen=listen, bootstrap=meeting_point.addresses)
        async with lattica.open_node(config) as ada, lattica.open_node(config) as bob:
            await ada.online(timeout=10)
            await bob.online(timeout=10)
            ada.rpc.register(worker)
            note = json.dumps({"addresses": ada.addresses})
            kept = await ada.dht.put(KEY, note.encode(), ttl=60)
            print(f"ada's note is kept by {kept} peer")

            # A record proves its author; what it says is only its author's word.
            for record in await bob.dht.get_all(KEY):
                await bob.connect(json.loads(record.value)["addresses"][0])
                size = await bob.rpc.call(record.author, "resize.half", 640, 480)
                print(f"{str(record.author)[-8:]} says {size}, until {record.expires:.0f}")


if __name__ == "__main__":
    trio.run(main)
