"""The control socket from a program: calls, streams, and what happens when either end goes away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import lattica
from lattica.control import ControlClient, NodeNotRunningError, open_client
from lattica.node import Node
from lattica.rpc import Call, Service
from lattica.testing import MemoryNetwork


@asynccontextmanager
async def a_node(folder: Path) -> AsyncIterator[Node]:
    """A node whose network is in memory and whose folder and socket are real."""
    async with (
        MemoryNetwork(seed=1) as network,
        lattica.open_node(lattica.NodeConfig(data_dir=folder), network=network) as node,
    ):
        yield node


def a_service(left: trio.Event) -> Service:
    service = Service("s")

    @service.method
    async def forever(call: Call) -> None:
        try:
            await trio.sleep_forever()
        finally:
            left.set()

    @service.method
    async def count(call: Call, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    @service.method
    async def fail(call: Call) -> None:
        raise lattica.ConfigError("the value 7 is wrong")

    return service


async def test_a_program_asks_a_node(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node, open_client(tmp_path) as client:
        told = await client.call("node.status")
        assert told["peer_id"] == str(node.peer_id)
        assert await client.call("node.peers") == []


async def test_items_stream(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node, open_client(tmp_path) as client:
        node.control.register(a_service(trio.Event()))
        async with client.stream("s.count", 100) as items:
            assert [item async for item in items] == list(range(100))


async def test_an_error_in_the_node_keeps_its_words(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node, open_client(tmp_path) as client:
        node.control.register(a_service(trio.Event()))
        with pytest.raises(lattica.RemoteError) as caught:
            await client.call("s.fail")
        assert (caught.value.code, caught.value.text) == ("ConfigError", "the value 7 is wrong")


async def test_a_command_that_leaves_stops_what_it_asked_for(tmp_path: Path) -> None:
    left = trio.Event()
    async with a_node(tmp_path) as node:
        node.control.register(a_service(left))
        async with open_client(tmp_path) as client:
            with pytest.raises(lattica.DeadlineError, match=r"the node did not answer s\.forever in time"):
                await client.call("s.forever", timeout=0.05)
        with trio.fail_after(5):
            await left.wait()


async def test_a_node_that_stops_ends_the_calls_to_it(tmp_path: Path) -> None:
    left = trio.Event()
    errors: list[lattica.StreamError] = []

    async def ask(client: ControlClient, asked: trio.Event) -> None:
        asked.set()
        try:
            await client.call("s.forever")
        except lattica.StreamError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        async with a_node(tmp_path) as node:
            node.control.register(a_service(left))
            client = await _entered(nursery, tmp_path)
            asked = trio.Event()
            nursery.start_soon(ask, client, asked)
            await asked.wait()
            await client.call("node.status")  # a stream of its own: the first call has been read by now
        with trio.fail_after(5):
            await left.wait()
            while not errors:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert "the node stopped before it answered s.forever" in str(errors[0])


async def _entered(nursery: trio.Nursery, folder: Path) -> ControlClient:
    """A client that stays open until the nursery ends."""

    async def keep(*, task_status: trio.TaskStatus[ControlClient]) -> None:
        async with open_client(folder) as client:
            task_status.started(client)
            await trio.sleep_forever()

    client: ControlClient = await nursery.start(keep)
    return client


async def test_no_node_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(NodeNotRunningError, match=str(tmp_path)) as caught:
        async with open_client(tmp_path):
            pass
    assert (caught.value.folder, caught.value.exit_code) == (tmp_path, 3)


async def test_a_stopped_node_leaves_no_socket(tmp_path: Path) -> None:
    async with a_node(tmp_path):
        assert (tmp_path / "control.sock").is_socket()
    assert not (tmp_path / "control.sock").exists()
    assert not list(tmp_path.glob("*.new"))


async def test_two_nodes_cannot_share_a_folder(tmp_path: Path) -> None:
    async with a_node(tmp_path):
        with pytest.raises(lattica.ConfigError, match=f"the data folder {tmp_path} is used"):
            async with a_node(tmp_path):
                pass
