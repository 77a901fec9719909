"""`lattica.aio`: a node for asyncio, over real sockets."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

import pytest
import trio
import trio.lowlevel

import lattica

CONFIG = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)

Events = asyncio.Queue[str]


def in_asyncio(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an asyncio loop; no thread of a node is left behind."""

    @wraps(test)
    def run() -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await test()

        asyncio.run(limited())
        assert [thread.name for thread in threading.enumerate() if thread.name == "lattica"] == []

    del run.__wrapped__  # type: ignore[attr-defined]  # or pytest-trio would see an async test
    return run


def worker(events: Events) -> lattica.Service:
    """A service for asyncio, with one plain function; `events` is told what happens in it."""
    service = lattica.Service("worker")

    @service.method
    async def hello(call: lattica.Call, name: str) -> str:
        await asyncio.sleep(0)
        return f"hello {name}, says {call.local}"

    @service.method
    async def count(call: lattica.Call, n: int) -> AsyncIterator[int]:
        try:
            for i in range(n):
                await asyncio.sleep(0)
                yield i
            raise ValueError("half way")
        finally:
            events.put_nowait("count is over")

    @service.method
    async def total(call: lattica.Call) -> int:
        return sum([item async for item in call.items])

    @service.method
    async def sleep(call: lattica.Call, seconds: float) -> None:
        events.put_nowait("asleep")
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            events.put_nowait("cancelled")
            raise

    @service.method
    async def left(call: lattica.Call) -> float | None:
        return call.remaining()

    @service.method
    def thread(call: lattica.Call) -> str:
        return threading.current_thread().name

    return service


@asynccontextmanager
async def mesh(events: Events | None = None) -> AsyncIterator[tuple[Any, Any]]:
    """A client, and the server that it is connected to."""
    async with lattica.aio.open_node(CONFIG) as server, lattica.aio.open_node(CONFIG) as client:
        server.rpc.register(worker(events or asyncio.Queue()))
        await client.connect(server.addresses[0])
        yield client, server


@in_asyncio
async def test_a_node_tells_who_and_where_it_is() -> None:
    async with mesh() as (client, server):
        assert server.addresses[0].endswith(str(server.peer_id))
        assert [peer.peer_id for peer in client.peers()] == [server.peer_id]
        assert (server.reachability, server.mapping) == ("unknown", "unknown")
        assert server.config is CONFIG
        assert server.data_dir is None
        assert server.uptime_seconds > 0
        assert "worker" in server.rpc.services
        await client.online(timeout=5)


@in_asyncio
async def test_calls_give_values_and_the_peers_errors() -> None:
    async with mesh() as (client, server):
        assert (
            await client.rpc.call(server.peer_id, "worker.hello", "Ada")
            == f"hello Ada, says {server.peer_id}"
        )
        assert 50 < await client.rpc.call(server.peer_id, "worker.left", timeout=60) <= 60
        assert await client.rpc.call(server.peer_id, "worker.thread") == "lattica handler"
        with pytest.raises(lattica.NoSuchMethodError):
            await client.rpc.call(server.peer_id, "worker.nothing")
        with pytest.raises(lattica.RemoteError, match="takes 1 argument, got 0"):
            await client.rpc.call(server.peer_id, "worker.hello")
        with pytest.raises(lattica.LocalProtocolError, match="peer id"):
            await client.rpc.call("nobody", "worker.hello")


@in_asyncio
async def test_streams_are_iterators() -> None:
    events: Events = asyncio.Queue()
    async with mesh(events) as (client, server):
        items = []
        async with client.rpc.stream(server.peer_id, "worker.count", 3) as stream:
            with pytest.raises(lattica.RemoteError, match="half way"):
                async for item in stream:
                    items.append(item)
        assert items == [0, 1, 2]
        async with client.rpc.stream(server.peer_id, "worker.total") as stream:
            for number in (1, 2, 39):
                await stream.send(number)
            await stream.finish()
            assert await stream.result() == 42
        with pytest.raises(lattica.StreamError, match="left"):
            await anext(stream)
        with pytest.raises(ZeroDivisionError):
            async with client.rpc.stream(server.peer_id, "worker.count", 1000) as stream:
                await anext(stream)
                raise ZeroDivisionError
        assert [await events.get() for _ in range(2)] == ["count is over"] * 2


@in_asyncio
async def test_timeouts_end_calls_and_streams() -> None:
    events: Events = asyncio.Queue()
    async with mesh(events) as (client, server):
        with pytest.raises(lattica.DeadlineError):
            await client.rpc.call(server.peer_id, "worker.sleep", 60, timeout=0.1)
        assert [await events.get() for _ in range(2)] == ["asleep", "cancelled"]
        with pytest.raises(lattica.DeadlineError):
            async with client.rpc.stream(server.peer_id, "worker.sleep", 60, timeout=0.1) as stream:
                await anext(stream)
        assert [await events.get() for _ in range(2)] == ["asleep", "cancelled"]


@in_asyncio
async def test_cancelling_a_task_cancels_the_handler_that_it_waits_for() -> None:
    events: Events = asyncio.Queue()
    async with mesh(events) as (client, server):
        call = asyncio.create_task(client.rpc.call(server.peer_id, "worker.sleep", 60))
        assert await events.get() == "asleep"
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await events.get() == "cancelled"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), client.rpc.stream(server.peer_id, "worker.sleep", 60) as stream:
                await anext(stream)
        assert [await events.get() for _ in range(2)] == ["asleep", "cancelled"]
        assert await client.rpc.call(server.peer_id, "worker.hello", "Ada")


@in_asyncio
async def test_many_tasks_call_at_once() -> None:
    async with mesh() as (client, server):
        answers = await asyncio.gather(
            *(client.rpc.call(server.peer_id, "worker.hello", str(n)) for n in range(300))
        )
        assert [answer.split(",")[0] for answer in answers] == [f"hello {n}" for n in range(300)]


@in_asyncio
async def test_a_handler_that_raises_cancelled_error_answers_with_an_error() -> None:
    service = lattica.Service("odd")

    @service.method
    async def cancelled(call: lattica.Call) -> None:
        raise asyncio.CancelledError

    async with mesh() as (client, server):
        server.rpc.register(service)
        with pytest.raises(lattica.RemoteError, match="cancelled in its event loop"):
            await client.rpc.call(server.peer_id, "odd.cancelled")


@in_asyncio
async def test_methods_for_trio_are_registered_in_trio() -> None:
    service = lattica.Service("trios")

    @service.method
    async def nap(call: lattica.Call) -> str:
        await trio.lowlevel.checkpoint()
        return threading.current_thread().name

    async def ping(node: lattica.Node, peer: lattica.PeerId) -> float:
        return await node.host.ping(peer)

    async with mesh() as (client, server):
        await server.run(lambda node: node.rpc.register(service))
        assert await client.rpc.call(server.peer_id, "trios.nap") == "lattica"
        assert await client.run(ping, server.peer_id) > 0


@in_asyncio
async def test_records_are_put_and_got() -> None:
    async with lattica.aio.open_node(CONFIG) as keeper:
        config = lattica.NodeConfig(
            listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None, bootstrap=[keeper.addresses[0]]
        )
        async with lattica.aio.open_node(config) as node:
            await node.online(timeout=10)
            assert await node.dht.put("jobs/today", b"sweep", ttl=60) == 1
            assert (await node.dht.get("jobs/today", author=node.peer_id)).value == b"sweep"
            assert [record.value for record in await node.dht.get_all("jobs/today")] == [b"sweep"]


@in_asyncio
async def test_what_a_block_raises_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with lattica.aio.open_node(CONFIG):
            raise ZeroDivisionError


@in_asyncio
async def test_a_node_that_cannot_start_raises_in_its_caller() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = lattica.NodeConfig(listen=[f"/ip4/127.0.0.1/tcp/{port}"], data_dir=None)
        with pytest.raises(lattica.ConfigError, match=str(port)):
            async with lattica.aio.open_node(config):
                pytest.fail("it is open")


@in_asyncio
async def test_opening_may_be_cancelled_at_any_time() -> None:
    for milliseconds in (0, 1, 3, 10, 30):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(milliseconds / 1000), lattica.aio.open_node(CONFIG):
                await asyncio.sleep(60)
        assert "lattica" not in [thread.name for thread in threading.enumerate()]


@in_asyncio
async def test_calls_after_closing_say_so() -> None:
    async with mesh() as (_, server), lattica.aio.open_node(CONFIG) as closed:
        await closed.connect(server.addresses[0])
        call = asyncio.create_task(closed.rpc.call(server.peer_id, "worker.sleep", 60))
        await asyncio.sleep(0)
        await closed.__aexit__(None, None, None)
        with pytest.raises(lattica.LatticaError, match="closed"):
            await call
        with pytest.raises(lattica.LatticaError, match="closed"):
            await closed.rpc.call(server.peer_id, "worker.hello", "Ada")
        with pytest.raises(lattica.LatticaError, match="closed"):
            closed.peers()
    with pytest.raises(lattica.LocalProtocolError, match="async with"):
        lattica.aio.open_node(CONFIG).peers()


@in_asyncio
async def test_a_node_that_fails_ends_its_block_with_the_error() -> None:
    async def fail() -> None:
        raise lattica.NetworkError("the cable is out")

    with pytest.raises(lattica.NetworkError, match="the cable is out"):
        async with lattica.aio.open_node(CONFIG) as node:
            await node.run(lambda inner: inner._nursery.start_soon(fail))


@in_asyncio
async def test_another_loop_is_refused() -> None:
    async def elsewhere(work: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(lattica.LocalProtocolError, match="another event loop"):
            await work()

    async with mesh() as (client, server):
        await asyncio.to_thread(
            asyncio.run, elsewhere(lambda: client.rpc.call(server.peer_id, "worker.hello", "Ada"))
        )


def test_ctrl_c_closes_cleanly() -> None:
    code = textwrap.dedent("""
        import asyncio, lattica
        config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)
        service = lattica.Service("worker")

        @service.method
        async def sleep(call):
            print("asleep", flush=True)
            try:
                await asyncio.sleep(600)
            finally:
                print("cancelled", flush=True)

        async def tick():  # asyncio sleeps over a signal that comes just before its select, until something wakes it
            while True:
                await asyncio.sleep(0.05)

        async def main():
            async with lattica.aio.open_node(config) as server, lattica.aio.open_node(config) as node:
                server.rpc.register(service)
                await node.connect(server.addresses[0])
                ticking = asyncio.create_task(tick())
                await node.rpc.call(server.peer_id, "worker.sleep", timeout=None)

        asyncio.run(main())
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "asleep\n"
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert out == "cancelled\n"
    assert error.splitlines()[-1] == "KeyboardInterrupt"
    assert process.returncode == -signal.SIGINT
