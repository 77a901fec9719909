"""How connections begin, are kept alive and end: dead addresses, dead peers, strangers at the port, short visits."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from multiaddr import Multiaddr

from lattica.errors import DialError, StreamError
from lattica.net import mux
from lattica.net.api import Stream
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity
from lattica.net.mux import WindowBudget
from lattica.net.transport import Transport
from lattica.protocols import PING_INTERVAL_SECONDS, PING_SOONER_SECONDS, PING_TIMEOUT_SECONDS
from lattica.telemetry import Metrics

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
HOLD = "/lattica/hold"
DEAD_ADDRESS_SECONDS = 2.0  # what docs/robustness.md promises


@asynccontextmanager
async def a_host(**changes: Any) -> AsyncIterator[MeshHost]:
    settings: dict[str, Any] = {"identity": Identity.generate(), "listen": [LOOPBACK]}
    async with open_host(**(settings | changes)) as host:
        yield host


async def hold(stream: Stream) -> None:
    await trio.sleep_forever()


def port_of(host: MeshHost) -> int:
    return int(host.transport.bound[0].value_for_protocol("tcp"))


def open_sockets() -> int:
    gc.collect()
    targets = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{entry}"))
    return sum(target.startswith("socket:") for target in targets)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(
    not has_ipv6() and not os.environ.get("CI"), reason="this machine has no IPv6 loopback"
)


# Dead addresses


async def seconds_until_error(host: MeshHost, port: int) -> float:
    address = f"/ip4/127.0.0.1/tcp/{port}"
    start = trio.current_time()
    with pytest.raises(DialError, match=address) as caught:
        await host.connect(f"{address}/p2p/{Identity.generate().peer_id}")
    assert [attempt[0] for attempt in caught.value.attempts] == [address]
    return trio.current_time() - start


async def test_an_address_that_swallows_packets_is_dead_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(2):  # the kernel takes one more than the backlog says; further ones get no answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        async with a_host(listen=[]) as host:
            assert await seconds_until_error(host, full.getsockname()[1]) <= DEAD_ADDRESS_SECONDS


async def test_a_listener_that_says_nothing_is_dead_in_time(autojump_clock: trio.testing.MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with a_host(listen=[]) as host:
            assert await seconds_until_error(host, silent.getsockname()[1]) <= DEAD_ADDRESS_SECONDS


async def test_a_dead_address_does_not_hold_up_a_live_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with a_host() as one, a_host() as two:
            one.add_addresses(two.peer_id, [f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}", *two.addresses])
            two.serve(HOLD, hold)
            with trio.fail_after(DEAD_ADDRESS_SECONDS):
                await one.open_stream(two.peer_id, [HOLD])


# Dialling from the listen port


@pytest.mark.parametrize("listen", [LOOPBACK, pytest.param("/ip6/::1/tcp/0", marks=needs_ipv6)])
async def test_a_dial_from_the_listen_port_shows_it_to_the_other_side(listen: str) -> None:
    async with (
        a_host(listen=[listen]) as one,
        a_host(listen=[listen]) as two,
        a_host(listen=[listen]) as three,
    ):
        for other in (two, three):
            connection = await one.transport.connect(Multiaddr(other.addresses[0]), from_listen_port=True)
            one.joined(connection)
            with trio.fail_after(5):
                while not other.peers():  # noqa: ASYNC110  # the other side's half of the handshake
                    await trio.sleep(0.001)
            assert [str(other_end.remote) for other_end in other.connections()] == [
                str(one.transport.bound[0])
            ]
        async with a_host(listen=[]) as visitor:
            await visitor.connect(one.addresses[0])  # and it still listens there


async def test_a_wildcard_listener_lends_its_port_too() -> None:
    async with a_host(listen=["/ip4/0.0.0.0/tcp/0"]) as one, a_host() as two:
        connection = await one.transport.connect(Multiaddr(two.addresses[0]), from_listen_port=True)
        assert connection.is_initiator
        one.joined(connection)
        await one.ping(two.peer_id)
        assert int(two.connections()[0].remote.value_for_protocol("tcp")) == port_of(one)


async def test_without_a_listen_port_of_that_family_there_is_nothing_to_dial_from() -> None:
    async with a_host(listen=[]) as one, a_host() as two:
        with pytest.raises(DialError, match="listens on no address"):
            await one.transport.connect(Multiaddr(two.addresses[0]), from_listen_port=True)


@needs_ipv6
@pytest.mark.parametrize("listen", ["/ip6/::1/tcp/0", "/ip6/::/tcp/0"])
async def test_ipv6_is_listened_on_and_dialled(listen: str) -> None:
    async with a_host(listen=[listen]) as one, a_host(listen=[]) as two:
        loopback = next(address for address in one.addresses if "/ip6/::1/" in address)
        assert await two.connect(loopback) == one.peer_id
        await two.ping(one.peer_id)
        assert str(two.connections()[0].remote).startswith("/ip6/::1/tcp/")


@needs_ipv6
async def test_one_port_serves_both_families() -> None:
    async with a_host() as one, a_host(listen=[]) as two:
        port = port_of(one)
        async with a_host(listen=[f"/ip6/::1/tcp/{port}"]) as other:
            await two.connect(one.addresses[0])
            await two.connect(other.addresses[0])


# Dead peers


class Wire:
    """Carries bytes between a dialler and a listener until it is cut: then nothing more passes, and nobody is told."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.cut = trio.CancelScope()

    async def serve(self, task_status: trio.TaskStatus[int]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listener.socket.getsockname()[1])
        near = await listener.accept()
        far = await trio.open_tcp_stream("127.0.0.1", self._target)
        with self.cut:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, near, far)
                nursery.start_soon(self._carry, far, near)
        await trio.sleep_forever()  # both ends stay open

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await sink.send_all(data)


@asynccontextmanager
async def wired() -> AsyncIterator[tuple[Wire, MeshHost, MeshHost]]:
    async with a_host() as server, a_host(listen=[]) as client, trio.open_nursery() as nursery:
        server.serve(HOLD, hold)
        wire = Wire(port_of(server))
        port = await nursery.start(wire.serve)
        await client.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{server.peer_id}")
        await client.ping(server.peer_id)
        yield wire, server, client
        nursery.cancel_scope.cancel()


async def test_a_call_to_a_peer_that_vanished_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with wired() as (wire, server, client):
        await trio.sleep(1)
        stream = await client.open_stream(server.peer_id, [HOLD])
        wire.cut.cancel()
        await trio.lowlevel.checkpoint()
        start = trio.current_time()
        await stream.send_all(b"is anybody there?")
        with pytest.raises(StreamError, match="after a ping"):
            await stream.receive_some()
        limit = PING_SOONER_SECONDS + PING_TIMEOUT_SECONDS + 2  # two looks of the timer
        assert trio.current_time() - start <= limit
        assert client.peers() == []


async def test_a_peer_that_vanished_while_a_writer_was_blocked_is_found(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The last byte heard came after the last byte sent, and the socket takes no more: nobody speaks, all wait."""

    async def send(stream: Stream) -> None:
        with pytest.raises(StreamError, match="after a ping"):
            while True:
                await stream.send_all(bytes(1 << 18))

    async with wired() as (wire, server, client):
        await trio.sleep(1)
        (connection,) = client.connections()
        wire.cut.cancel()
        async with trio.open_nursery() as nursery:
            for _ in range(64):  # 16 MiB in windows: more than the sockets on the way hold
                nursery.start_soon(send, await client.open_stream(server.peer_id, [HOLD]))
            await trio.testing.wait_all_tasks_blocked()
            assert connection._sealed
            connection.spoke = False  # as a last window update would have left it
            start = trio.current_time()
            await connection.ended.wait()
        assert trio.current_time() - start <= PING_SOONER_SECONDS + PING_TIMEOUT_SECONDS + 2


async def test_an_idle_peer_that_vanished_leaves_both_lists(autojump_clock: trio.testing.MockClock) -> None:
    async with wired() as (wire, server, client):
        wire.cut.cancel()
        await trio.sleep(PING_INTERVAL_SECONDS + PING_TIMEOUT_SECONDS + 2)
        assert client.peers() == server.peers() == []


async def test_an_idle_hour_ends_no_connection_and_costs_a_ping_a_quarter_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with a_host() as server, a_host(listen=[]) as client:
        await client.connect(server.addresses[0])
        await client.ping(server.peer_id)
        await trio.sleep(60)
        before = client.traffic.sent_bytes
        await trio.sleep(3600)
        assert len(client.peers()) == len(server.peers()) == 1
        pings = 2 * (3600 / PING_INTERVAL_SECONDS + 1)  # and as many answers to the other side's
        assert client.traffic.sent_bytes - before <= pings * (12 + 18)


async def test_a_ping_measures_the_round_trip_without_being_asked() -> None:
    async with a_host() as server, a_host(listen=[]) as client:
        await client.connect(server.addresses[0])
        with trio.fail_after(5):
            while not client.peers()[0].rtt:  # noqa: ASYNC110  # no event tells of a ping
                await trio.sleep(0.001)
        assert (client.connections()[0].mux.rtt or 0) > 0


async def test_a_peer_that_breaks_the_protocol_is_told_so() -> None:
    async with a_host() as server:
        stranger = Transport(Identity.generate(), windows=WindowBudget(0))
        connection = await stranger.connect(Multiaddr(server.addresses[0]))
        events = connection.mux.start(b"")
        connection._sock.setblocking(True)
        connection._sock.sendall(b"\x00\x20" + bytes(32))  # a record that nobody sealed

        def read_all() -> bytes:
            data = b""
            while more := connection._sock.recv(65_536):
                data += more
            return data

        with trio.fail_after(5):
            events += connection.mux.receive(await trio.to_thread.run_sync(read_all), 0.0)
        assert (mux.WENT_AWAY, 0, 1) in events
        connection.abort("done")


# Strangers


async def test_a_crowd_at_the_port_pushes_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattica.net.transport.MAX_HANDSHAKES", 4)
    async with a_host(listen=["/ip4/0.0.0.0/tcp/0"]) as host:
        with contextlib.ExitStack() as stack:

            async def visit(source: str) -> socket.socket:
                client = stack.enter_context(
                    socket.create_connection(("127.0.0.1", port_of(host)), source_address=(source, 0))
                )
                client.setblocking(False)
                await trio.testing.wait_all_tasks_blocked(0.01)
                return client

            lone = await visit("127.0.0.2")
            crowd = [await visit("127.0.0.3") for _ in range(6)]
            greeting = b"\x13/multistream/1.0.0\n"
            assert lone.recv(100) == greeting
            with pytest.raises(BlockingIOError):
                lone.recv(100)
            assert crowd[0].recv(100) == greeting
            assert crowd[0].recv(100) == b""


# Visits


async def test_short_lived_peers_leave_nothing_behind() -> None:
    async def read(stream: Stream) -> None:
        while await stream.receive_some():
            pass

    async with a_host(max_connections=20) as host:
        host.serve(HOLD, read)

        async def visit() -> None:
            async with a_host(listen=[]) as peer:
                await peer.connect(host.addresses[0])
                await (await peer.open_stream(host.peer_id, [HOLD])).send_all(b"hello")

        async def all_left() -> None:
            with trio.fail_after(5):
                while host.peers():  # noqa: ASYNC110  # a real socket's end
                    await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)

        await visit()
        await all_left()
        sockets, tasks = open_sockets(), trio.lowlevel.current_statistics().tasks_living
        for _ in range(60):
            await visit()
        await all_left()
        assert open_sockets() == sockets
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert host.connections() == []
        assert len(host.table) == 61


async def test_limits_of_connections_are_arguments() -> None:
    identity = Identity.generate()
    async with a_host(max_connections_per_peer=1) as host, a_host(identity=identity) as one:
        await one.connect(host.addresses[0])
        async with a_host(identity=identity) as same:
            with contextlib.suppress(DialError, StreamError):  # refused before or after its side is done
                await same.connect(host.addresses[0])
                await same.ping(host.peer_id)
            assert len(host.connections(identity.peer_id)) == 1
        assert await one.ping(host.peer_id) > 0


async def test_traffic_is_counted_where_the_node_counts() -> None:
    metrics = Metrics()
    async with a_host(metrics=metrics) as host, a_host() as other:
        await other.connect(host.addresses[0])
        await other.ping(host.peer_id)
        text = metrics.exposition().decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["lattica_net_connections"]) == 1
        assert float(values['lattica_net_bytes_total{direction="in"}']) > 100
        assert float(values['lattica_net_bytes_total{direction="out"}']) > 100
        assert float(values['lattica_net_streams_total{by="peers"}']) >= 1
    assert b"lattica_net" not in metrics.exposition()
