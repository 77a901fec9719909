"""A node calls itself: whoever serves may also ask, without a second node."""

from __future__ import annotations

import numpy as np
import pytest
import trio

import lattica
from lattica.testing import MemoryNetwork


async def test_a_node_calls_its_own_service(autojump_clock: trio.testing.MockClock) -> None:
    mirror = lattica.Service("mirror")

    @mirror.method
    async def back(call: lattica.Call, value: object) -> list[object]:
        return [str(call.peer), value]

    @mirror.method
    async def count(call: lattica.Call, n: int):  # type: ignore[no-untyped-def]
        for index in range(n):
            yield index
        raise ValueError("that is all")

    async with (
        MemoryNetwork(seed=1) as network,
        lattica.open_node(lattica.NodeConfig(data_dir=None), network=network) as node,
    ):
        node.rpc.register(mirror)
        big = np.arange(1 << 20, dtype=np.float32)  # far beyond what a socket buffers
        peer, value = await node.rpc.call(node.peer_id, "mirror.back", big)
        assert peer == str(node.peer_id)
        assert np.array_equal(value, big)
        seen = []
        with pytest.raises(lattica.RemoteError, match="that is all"):
            async with node.rpc.stream(node.peer_id, "mirror.count", 3) as items:
                async for item in items:
                    seen.append(item)
        assert seen == [0, 1, 2]


async def test_leaving_a_node_ends_its_calls_to_itself(autojump_clock: trio.testing.MockClock) -> None:
    ended = trio.Event()
    slow = lattica.Service("slow")

    @slow.method
    async def forever(call: lattica.Call) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        async with lattica.open_node(lattica.NodeConfig(data_dir=None), network=network) as node:
            node.rpc.register(slow)
            nursery.start_soon(_ignore_loss, node)
            await trio.testing.wait_all_tasks_blocked()
        assert ended.is_set()


async def _ignore_loss(node: lattica.Node) -> None:
    with pytest.raises(lattica.StreamError):
        await node.rpc.call(node.peer_id, "slow.forever", timeout=None)
