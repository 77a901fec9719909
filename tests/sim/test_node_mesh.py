"""Nodes on a MemoryNetwork: they find each other, come back, and stop in one piece."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import lattica
from lattica import protocols, status
from lattica.bootstrap import FIRST_DELAY_SECONDS
from lattica.cli.node import CHANGE_SECONDS, changes
from lattica.node import Node
from lattica.testing import MemoryNetwork


@dataclass
class Mesh:
    """Opens nodes that end with the test."""

    network: MemoryNetwork
    stack: AsyncExitStack

    async def node(self, *bootstrap: Node | str, **settings: Any) -> Node:
        return await self.stack.enter_async_context(self.opened(*bootstrap, **settings))

    def opened(self, *bootstrap: Node | str, **settings: Any) -> Any:
        addresses = [a for node in bootstrap for a in ([node] if isinstance(node, str) else node.addresses)]
        config = lattica.NodeConfig(bootstrap=addresses, **settings)
        return lattica.open_node(config, network=self.network, rng=random.Random(1))


@asynccontextmanager
async def a_mesh(latency: float = 0.01) -> AsyncIterator[Mesh]:
    async with MemoryNetwork(seed=1, latency=latency) as network, AsyncExitStack() as stack:
        yield Mesh(network, stack)


async def until(condition: Any) -> float:
    """When the condition holds; asked each virtual millisecond."""
    with trio.fail_after(3600):
        while not condition():  # noqa: ASYNC110 - in virtual time, and a table has no event to wait for
            await trio.sleep(0.001)
    return trio.current_time()


async def test_a_first_node_is_online_at_once(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        node = await mesh.node()
        before = trio.current_time()
        await node.online(timeout=1)
        assert trio.current_time() == before


async def test_a_node_meets_its_bootstrap_peer(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        node = await mesh.node(first)
        await node.online(timeout=1)
        assert [peer.peer_id for peer in node.peers()] == [first.peer_id]
        assert await until(lambda: [peer.peer_id for peer in first.peers()] == [node.peer_id])


async def test_nobody_there_is_an_error_that_names_the_address(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        async with mesh.opened() as gone:
            address = gone.addresses[0]
        node = await mesh.node(address)
        with pytest.raises(lattica.DialError, match="within 45 s") as caught:
            await node.online(timeout=45)
        assert [attempt[0] for attempt in caught.value.attempts] == [address]


async def test_a_bootstrap_peer_that_starts_late_is_found(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        late = await mesh.node()
        other = await mesh.node()
        mesh.network.partition([late.peer_id], [other.peer_id])
        node_config = lattica.NodeConfig(bootstrap=late.addresses)
        async with lattica.open_node(node_config, network=mesh.network, rng=random.Random(1)) as node:
            mesh.network.partition([late.peer_id], [node.peer_id])
            with pytest.raises(lattica.DialError):
                await node.online(timeout=20)
            mesh.network.heal()
            await node.online(timeout=60)
            assert node.peers()


async def test_a_lost_bootstrap_peer_is_dialled_again(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        node = await mesh.node(first)
        await node.online(timeout=1)
        mesh.network.cut(node.peer_id, first.peer_id)
        lost = await until(lambda: not node.peers())
        assert await until(node.peers) - lost <= FIRST_DELAY_SECONDS + 0.1


async def test_a_call_redials_a_known_peer_by_itself(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        node = await mesh.node(first)
        await node.online(timeout=1)
        await node.rpc.call(first.peer_id, "lattica.serves")
        mesh.network.cut(node.peer_id, first.peer_id)
        await until(lambda: not node.peers())
        assert await node.rpc.call(first.peer_id, "lattica.serves", timeout=0.2) == {}


async def test_a_call_may_come_before_the_first_connection(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        node = await mesh.node(first)
        assert not node.peers()
        assert await node.rpc.call(first.peer_id, "lattica.serves") == {}


async def test_peers_learn_what_a_node_serves(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        node = await mesh.node(first)
        node.serves["shard"] = "tiny 0:10"
        await until(first.peers)
        assert await first.rpc.call(node.peer_id, "lattica.serves") == {"shard": "tiny 0:10"}


async def test_a_boasting_peer_does_not_flood_the_table(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        node = await mesh.node(first)
        node.serves |= {f"{number} " + "x" * 999: "y" * 999 for number in range(100)}
        await until(first.peers)
        (row,) = await status.peer_rows(first)
        assert len(row["serves"]) == status.MAX_SERVES
        assert {len(word) for pair in row["serves"].items() for word in pair} == {
            status.MAX_SERVES_CHARACTERS
        }


async def test_every_inbound_stream_passes_the_gate(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    asked: list[tuple[lattica.PeerId, str]] = []

    def gate(self: Node, peer: lattica.PeerId, protocol: str) -> bool:
        asked.append((peer, protocol))
        return protocol != protocols.RECORDS

    async with a_mesh() as mesh:
        monkeypatch.setattr(Node, "gate", gate)
        first = await mesh.node()
        node = await mesh.node(first)
        assert await node.rpc.call(first.peer_id, "lattica.serves") == {}
        with pytest.raises(lattica.RecordError):
            await node.dht.put("k", b"v")
        assert set(asked) == {(node.peer_id, protocols.RPC), (node.peer_id, protocols.RECORDS)}


async def test_an_endpoint_is_one_object_and_under_the_gate(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        node = await mesh.node()
        assert node.endpoint(protocols.RPC) is node.rpc
        assert node.endpoint("/lattica/mine/1.0.0") is node.endpoint("/lattica/mine/1.0.0")
        with pytest.raises(lattica.LocalProtocolError, match="not under /lattica/"):
            node.endpoint("/ipfs/mine/1.0.0")


async def test_an_error_in_the_block_comes_out_as_itself(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        with pytest.raises(lattica.RecordError, match="mine"):
            async with mesh.opened():
                raise lattica.RecordError("mine")


async def test_an_error_in_a_group_of_one_comes_out_as_itself(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        with pytest.raises(lattica.RecordError, match="mine"):
            async with mesh.opened(), trio.open_nursery():
                raise lattica.RecordError("mine")


async def test_a_node_that_stops_is_missed_by_its_peers(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.node()
        async with mesh.opened(first) as node:
            await node.online(timeout=1)
            await until(first.peers)
        await until(lambda: not first.peers())
        assert b"lattica_peers 0.0" in first.metrics.exposition()


async def test_a_change_of_addresses_is_told_once(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        node = await mesh.node()
        told = []

        async def listen() -> None:
            async for change in changes(node):
                told.append(change)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.sleep(1)
            node.reachability = "public"
            await trio.sleep(10 * CHANGE_SECONDS)
            nursery.cancel_scope.cancel()
        assert told == [{"reachability": "public", "addresses": node.addresses}]


def test_a_swarm_is_refused_not_ignored() -> None:
    with pytest.raises(lattica.ConfigError, match="no swarms"):
        lattica.NodeConfig(swarm="join")
