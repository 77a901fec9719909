"""One model on three shards, asked by a fourth node. Run: python examples/three_shards.py MODEL [PROMPT]

MODEL is a folder, or a name from `lattica model ls`. All four nodes are in this process and talk over real
connections; on three machines each would run the part that is its own.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from itertools import pairwise

import trio

import lattica
import lattica_infer
from lattica_infer.weights.store import ModelStore


def thirds(layers: int) -> list[range]:
    ends = [round(part * layers / 3) for part in range(4)]
    return [range(first, stop) for first, stop in pairwise(ends)]


async def main(model: str, prompt: str) -> None:
    async with AsyncExitStack() as stack:

        async def node(*bootstrap: str) -> lattica.Node:
            config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=list(bootstrap))
            return await stack.enter_async_context(lattica.open_node(config))

        first = await node()  # keeps the records by which the others find each other
        for layers in thirds(ModelStore().resolve(model).config.num_layers):
            shard = await node(first.addresses[0])
            await shard.online(timeout=30)
            await stack.enter_async_context(lattica_infer.serve_shard(shard, model, layers))
            print(f"{shard.peer_id} serves layers {layers.start}-{layers.stop - 1}")

        asker = await node(first.addresses[0])
        await asker.online(timeout=30)
        mesh = await stack.enter_async_context(lattica_infer.open_model(asker, model))
        async with mesh.generate(prompt, max_tokens=40) as stream:
            async for token in stream:
                print(token.text, end="", flush=True)
        print(f"\n{stream.stats.tokens} tokens in {stream.stats.rounds} rounds")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    trio.run(main, sys.argv[1], " ".join(sys.argv[2:]) or "The mesh wakes")
