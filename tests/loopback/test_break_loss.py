"""Servers that die, freeze, come back or were never there: who calls them is told, in time, and is served again."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from breaking import KIB, MIB, NodeProcess, node_process, open_client, restarted, takes_at_most, until

import lattica
from lattica.net.identity import Identity

KILLED_SECONDS = 5.0  # until every call in flight to a killed server has ended
FROZEN_SECONDS = (
    8.0  # the same for a frozen one, where pings go out after 0.5 or 2 s and are waited for for 1 s
)
DEAD_SECONDS = 2.0  # until a dead address has shown as an error


async def all_in_flight_ends_with_an_error(
    client: lattica.Node, server: NodeProcess, end_it: signal.Signals
) -> float:
    """Calls, streams and a send in mid-write, none with a deadline; how long they all took to end."""
    calls, streams = 64, 8
    errors: list[BaseException] = []
    rpc, peer = client.rpc, server.peer_id

    async def call() -> None:
        with pytest.raises(lattica.StreamError) as raised:
            await rpc.call(peer, "break.hold", "call", timeout=None)
        errors.append(raised.value)

    async def read_stream() -> None:
        with pytest.raises(lattica.StreamError) as raised:
            async with rpc.stream(peer, "break.hold", "stream") as items:
                async for _ in items:
                    pass
        errors.append(raised.value)

    async def send_stream() -> None:
        with pytest.raises(lattica.StreamError) as raised:
            async with rpc.stream(peer, "break.take_late", "never") as stream:
                while True:
                    await stream.send((0, bytes(64 * KIB)))
        errors.append(raised.value)

    async def write() -> None:
        with pytest.raises(lattica.StreamError) as raised:
            while True:
                await rpc.call(peer, "break.size", bytes(32 * MIB), timeout=None)
        errors.append(raised.value)

    async with trio.open_nursery() as nursery:
        for _ in range(calls):
            nursery.start_soon(call)
        for _ in range(streams):
            nursery.start_soon(read_stream)
        nursery.start_soon(send_stream)
        nursery.start_soon(write)
        await rpc.call(peer, "break.reach", "call began", calls)
        await rpc.call(peer, "break.reach", "stream began", streams)
        await rpc.call(peer, "break.reach", "never taken", 1)
        start = time.monotonic()
        server.signal(end_it)
    assert len(errors) == calls + streams + 2
    return time.monotonic() - start


async def test_kill_9_of_the_server_ends_every_call_in_flight_with_an_error_within_5_s(
    tmp_path: Path,
) -> None:
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            took = await all_in_flight_ends_with_an_error(client, server, signal.SIGKILL)
            assert took <= KILLED_SECONDS
            assert client.peers() == []


async def test_a_frozen_server_ends_every_call_in_flight_once_a_ping_stays_unanswered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells a frozen machine from a silent one but a ping, so that is how long it takes."""
    monkeypatch.setattr("lattica.net.connection.PING_INTERVAL_SECONDS", 2.0)
    monkeypatch.setattr("lattica.net.connection.PING_SOONER_SECONDS", 0.5)
    monkeypatch.setattr("lattica.net.connection.PING_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr("lattica.net.host.CHECK_SECONDS", 0.5)
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            took = await all_in_flight_ends_with_an_error(client, server, signal.SIGSTOP)
            assert took <= FROZEN_SECONDS
            assert client.peers() == []
            # It wakes up, and is called again as if nothing had been.
            server.signal(signal.SIGCONT)
            assert await client.rpc.call(server.peer_id, "break.echo", "awake") == "awake"


async def test_a_call_to_a_frozen_server_keeps_its_own_timeout(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            assert await client.rpc.call(server.peer_id, "break.echo", 1) == 1
            server.signal(signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(lattica.DeadlineError, match=r"break.echo .* 1 s"):
                await client.rpc.call(server.peer_id, "break.echo", 2, timeout=1.0)
            assert 1.0 <= time.monotonic() - start <= 1.2


async def test_a_restarted_server_is_reached_again_by_the_next_call(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            assert await client.rpc.call(server.peer_id, "break.echo", 1) == 1
            server.kill()
            async with restarted(tmp_path, server) as again:
                assert await client.rpc.call(again.peer_id, "break.echo", 2) == 2


async def test_a_server_that_was_away_is_reached_again_after_calls_that_failed(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            server.kill()
            server.process.wait()
            for _ in range(5):
                with pytest.raises(lattica.NetworkError):
                    await client.rpc.call(server.peer_id, "break.echo", 1)
            async with restarted(tmp_path, server) as again:
                assert await client.rpc.call(again.peer_id, "break.echo", 2) == 2


async def test_a_restarted_bootstrap_peer_is_connected_again_without_a_call(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client(bootstrap=[server.address]) as client:
            await client.online()
            server.kill()

            async def away() -> bool:
                return not client.peers()

            await until(away)
            async with restarted(tmp_path, server) as again:
                await client.online()
                assert [peer.peer_id for peer in client.peers()] == [again.peer_id]


@contextmanager
def closed_port() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as taken:  # bound and not listening: refused, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        yield f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"


@contextmanager
def swallowing_port() -> Iterator[str]:
    """An address whose SYNs are dropped: Linux does that while the backlog of a listening socket is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"
        for filler in fillers:
            filler.close()


@contextmanager
def silent_port() -> Iterator[str]:
    """An address that accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"


DEAD = {"closed": closed_port, "swallowed": swallowing_port, "silent": silent_port}


@pytest.mark.parametrize("kind", DEAD)
async def test_a_dead_address_errors_within_2_s_and_says_which(kind: str) -> None:
    peer = Identity.generate().peer_id
    async with open_client() as client:
        with DEAD[kind]() as address:
            with takes_at_most(DEAD_SECONDS), pytest.raises(lattica.DialError, match=address) as raised:
                await client.connect(f"{address}/p2p/{peer}")
            assert [where for where, _ in raised.value.attempts] == [address]
            # And whoever calls the peer that is said to be there is told the same.
            client.host.add_addresses(peer, [address])
            with takes_at_most(DEAD_SECONDS), pytest.raises(lattica.DialError, match=address):
                await client.rpc.call(peer, "break.echo", 1)


async def test_a_dead_address_beside_a_live_one_costs_no_error(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client() as client:
            with swallowing_port() as dead, takes_at_most(DEAD_SECONDS):
                client.host.add_addresses(server.peer_id, [server.listen, dead])
                assert await client.rpc.call(server.peer_id, "break.echo", 1) == 1


async def test_another_peer_at_the_address_is_told_by_name(tmp_path: Path) -> None:
    wanted = Identity.generate().peer_id
    with node_process(tmp_path) as server:
        async with open_client() as client:
            with takes_at_most(DEAD_SECONDS), pytest.raises(lattica.DialError, match=str(wanted)) as raised:
                await client.connect(f"{server.listen}/p2p/{wanted}")
            assert str(server.peer_id) in str(raised.value)
