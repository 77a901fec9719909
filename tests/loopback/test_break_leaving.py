"""Callers that leave: in time, in the middle, by force. What they asked for ends, and nobody else notices."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import trio
from breaking import KIB, MIB, NodeProcess, node_process, open_client, until

import lattica

STOPS_SECONDS = 2.0  # until the producer of an abandoned stream has ended
TIMEOUT_SLACK = 0.2  # of a caller's timeout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One node for all tests of the module: each of them also shows that those before left it whole."""
    with node_process(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.mark.parametrize("item_bytes", [8, 64 * KIB], ids=["small", "large"])
@pytest.mark.parametrize(
    "how", ["leaves the block", "is cancelled", "disconnects", "stopped reading long ago"]
)
async def test_an_abandoned_stream_stops_its_producer_within_2_s(
    server: NodeProcess, how: str, item_bytes: int
) -> None:
    name = f"{how} {item_bytes}"
    async with open_client(server) as watcher, open_client(server) as client:
        with trio.CancelScope() as scope:
            async with client.rpc.stream(server.peer_id, "break.produce", 1 << 40, item_bytes, name) as items:
                for _ in range(3):
                    await items.__anext__()
                if how == "stopped reading long ago":
                    await _stands_still(watcher, server, f"{name} item")
                if how == "is cancelled":
                    scope.cancel()
                if how == "disconnects":
                    await client.host.disconnect(server.peer_id)
                at = time.monotonic()
        ended = await watcher.rpc.call(server.peer_id, "break.reach", f"{name} ended", 1)
        assert ended - at <= STOPS_SECONDS


async def _stands_still(watcher: lattica.Node, server: NodeProcess, what: str) -> None:
    """Wait until backpressure has stopped a count."""
    known = -1

    async def is_still() -> bool:
        nonlocal known
        before, known = known, await watcher.rpc.call(server.peer_id, "break.count", what)
        await trio.sleep(0.1)
        return bool(before == known)

    await until(is_still)


async def test_a_killed_caller_stops_the_producer_within_2_s(server: NodeProcess, tmp_path: Path) -> None:
    name = "killed caller"
    async with open_client(server) as watcher:
        with node_process(tmp_path) as caller:
            await watcher.connect(caller.address)
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(lattica.StreamError):
                        await watcher.rpc.call(
                            caller.peer_id, "break.read_one_and_hold", server.address, name, timeout=None
                        )

                nursery.start_soon(ask)
                await watcher.rpc.call(server.peer_id, "break.reach", f"{name} item", 1)
                await _stands_still(watcher, server, f"{name} item")
                at = caller.kill()
            ended = await watcher.rpc.call(server.peer_id, "break.reach", f"{name} ended", 1)
            assert ended - at <= STOPS_SECONDS


@pytest.mark.parametrize("seconds", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["call", "stream"])
async def test_a_callers_timeout_is_kept_within_20_percent_and_cancels_the_handler(
    server: NodeProcess, kind: str, seconds: float
) -> None:
    name = f"{kind} of {seconds}"
    async with open_client(server) as client:
        await client.rpc.call(server.peer_id, "break.echo", 1)
        start = time.monotonic()
        with pytest.raises(lattica.DeadlineError):
            if kind == "call":
                await client.rpc.call(server.peer_id, "break.hold", name, timeout=seconds)
            else:
                async with client.rpc.stream(server.peer_id, "break.hold", name, timeout=seconds) as items:
                    await items.__anext__()
        took = time.monotonic() - start
        assert seconds <= took <= seconds * (1 + TIMEOUT_SLACK)
        ended = await client.rpc.call(server.peer_id, "break.reach", f"{name} ended", 1)
        assert seconds * (1 - TIMEOUT_SLACK) <= ended - start <= seconds * (1 + TIMEOUT_SLACK)


@pytest.mark.parametrize("kind", ["call", "stream"])
async def test_a_handler_that_says_nothing_is_cancelled_with_its_caller(
    server: NodeProcess, kind: str
) -> None:
    name = f"silent {kind}"
    async with open_client(server) as client:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                if kind == "call":
                    await client.rpc.call(server.peer_id, "break.hold", name)
                else:
                    async with client.rpc.stream(server.peer_id, "break.hold", name) as items:
                        await items.__anext__()

            nursery.start_soon(ask)
            await client.rpc.call(server.peer_id, "break.reach", f"{name} began", 1)
            at = time.monotonic()
            nursery.cancel_scope.cancel()
        ended = await client.rpc.call(server.peer_id, "break.reach", f"{name} ended", 1)
        assert ended - at <= STOPS_SECONDS


async def test_a_timeout_ends_the_handler_of_a_caller_that_is_frozen(
    server: NodeProcess, tmp_path: Path
) -> None:
    """What is left of it has travelled with the call: nobody has to say that it is over."""
    name, seconds = "frozen caller", 2.0
    async with open_client(server) as watcher:
        with node_process(tmp_path) as caller:
            await watcher.connect(caller.address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    watcher.rpc.call, caller.peer_id, "break.call_hold", server.address, name, seconds
                )
                await watcher.rpc.call(server.peer_id, "break.reach", f"{name} began", 1)
                at = time.monotonic()
                caller.signal(signal.SIGSTOP)
                ended = await watcher.rpc.call(server.peer_id, "break.reach", f"{name} ended", 1)
                assert ended - at <= seconds * (1 + TIMEOUT_SLACK)
                nursery.cancel_scope.cancel()


async def test_200_calls_cancelled_in_mid_write_leave_the_connection_usable(server: NodeProcess) -> None:
    value = bytes(32 * MIB)
    cancelled = 0
    async with open_client(server) as client:
        connections = client.host.connections(server.peer_id)  # type: ignore[attr-defined]
        lost = []
        client.host.watch(lambda peer, connected: lost.append(peer))

        async def call(seconds: float) -> None:
            nonlocal cancelled
            with trio.move_on_after(seconds) as scope:
                await client.rpc.call(server.peer_id, "break.size", value)
            cancelled += scope.cancelled_caught

        for number in range(100):  # one at a time: each is cut at another point of the write
            await call(number * 0.0001)
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(call, number * 0.001)
        assert cancelled == 200
        body = bytes(range(256)) * 4096
        assert await client.rpc.call(server.peer_id, "break.echo", body) == body
        assert client.host.connections(server.peer_id) == connections  # type: ignore[attr-defined]
        assert lost == []
        # Every cancelled call has given back its place: as many as are allowed can be in flight at once.
        async with trio.open_nursery() as nursery:
            for number in range(512):
                nursery.start_soon(client.rpc.call, server.peer_id, "break.meet", number, 512)
