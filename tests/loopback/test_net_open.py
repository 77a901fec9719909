"""Opening, dialling and closing hosts, all in one process."""

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

from lattica.errors import ConfigError, DialError, LocalProtocolError, StreamError, UnreachableError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity
from lattica.protocols import MAX_CONNECTIONS_PER_PEER

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def a_host(**changes: Any) -> AsyncIterator[MeshHost]:
    settings: dict[str, Any] = {"identity": Identity.generate(), "listen": [LOOPBACK]}
    async with open_host(**(settings | changes)) as host:
        with trio.fail_after(20):
            yield host


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def open_sockets() -> int:
    gc.collect()
    targets = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{entry}"))
    return sum(target.startswith("socket:") for target in targets)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# Addresses


async def test_port_0_becomes_the_port_that_was_taken() -> None:
    async with a_host() as host:
        (address,) = host.addresses
        assert address.startswith("/ip4/127.0.0.1/tcp/")
        assert "/tcp/0/" not in address
        assert address.endswith(f"/p2p/{host.peer_id}")


async def test_a_wildcard_becomes_the_addresses_of_this_machine() -> None:
    async with a_host(listen=["/ip4/0.0.0.0/tcp/0"]) as host, a_host() as other:
        assert all("0.0.0.0" not in address for address in host.addresses)
        loopback = next(address for address in host.addresses if "/127.0.0.1/" in address)
        assert await other.connect(loopback) == host.peer_id


async def test_announced_addresses_replace_the_others_also_for_peers() -> None:
    announced = "/dns4/node.example/tcp/4001"
    async with a_host(announce=[announced]) as host, a_host() as other:
        assert host.addresses == [f"{announced}/p2p/{host.peer_id}"]
        port = host.transport.bound[0].value_for_protocol("tcp")
        await other.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{host.peer_id}")
        with trio.fail_after(5):
            while not other.peers()[0].agent:  # noqa: ASYNC110  # nothing here could set an event
                await trio.sleep(0.001)
        assert other.peers()[0].addresses == (announced,)


async def test_a_host_may_listen_nowhere() -> None:
    async with a_host(listen=[]) as host, a_host() as other:
        assert host.addresses == []
        await host.connect(other.addresses[0])


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/udp/4001/quic-v1",
        "/dns4/localhost/tcp/0",
        "/ip4/198.51.100.7/tcp/0",
    ],
)
async def test_an_address_that_we_cannot_listen_on_is_one_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        async with a_host(listen=[LOOPBACK, address]):
            pass


async def test_a_port_in_use_is_one_sentence_that_says_what_to_try() -> None:
    async with a_host() as host:
        address = host.addresses[0].partition("/p2p/")[0]
        before = open_sockets()
        with pytest.raises(ConfigError, match=f"{address}: the port is in use") as caught:
            async with a_host(listen=[LOOPBACK, address]):
                pass
        assert "\n" not in str(caught.value)
        del caught
        assert open_sockets() == before


# Dialling


async def test_a_peer_is_dialled_by_itself_when_its_address_is_known() -> None:
    async with a_host() as one, a_host() as two:
        two.serve("/lattica/echo", echo)
        with pytest.raises(UnreachableError, match=str(two.peer_id)):
            await one.open_stream(two.peer_id, ["/lattica/echo"])
        one.add_addresses(two.peer_id, ["nonsense", "/ip4/127.0.0.1/udp/1", *two.addresses])
        stream = await one.open_stream(two.peer_id, ["/lattica/echo"])
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        await one.disconnect(two.peer_id)
        await (await one.open_stream(two.peer_id, ["/lattica/echo"])).aclose()


async def test_dials_at_once_share_one_connection() -> None:
    async with a_host() as one, a_host() as two:
        two.serve("/lattica/echo", echo)
        one.add_addresses(two.peer_id, two.addresses)

        async def use() -> None:
            await (await one.open_stream(two.peer_id, ["/lattica/echo"])).aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(use)
                nursery.start_soon(one.connect, two.addresses[0])
        assert len(one.connections(two.peer_id)) == 1


async def test_peers_that_dial_each_other_at_once_lose_no_stream() -> None:
    async with a_host() as one, a_host() as two:
        one.serve("/lattica/echo", echo)
        two.serve("/lattica/echo", echo)
        answers = []

        async def use(host: MeshHost, other: MeshHost) -> None:
            await host.connect(other.addresses[0])
            stream = await host.open_stream(other.peer_id, ["/lattica/echo"])
            for _ in range(20):
                await stream.send_all(b"x")
                answers.append(await stream.receive_some())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, one, two)
            nursery.start_soon(use, two, one)
        assert answers == [b"x"] * 40
        assert [len(host.peers()) for host in (one, two)] == [1, 1]


async def test_another_peer_at_the_address_is_not_taken_for_the_one_we_want() -> None:
    async with a_host() as one, a_host() as two:
        wanted = Identity.generate().peer_id
        address = two.addresses[0].partition("/p2p/")[0]
        with pytest.raises(DialError, match=f"expected peer {wanted}, but {two.peer_id}"):
            await one.connect(f"{address}/p2p/{wanted}")
        assert one.peers() == two.peers() == []


async def test_a_refused_dial_says_why() -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}"
    peer = Identity.generate().peer_id
    async with a_host() as host:
        with pytest.raises(DialError, match="refused") as caught:
            await host.connect(f"{address}/p2p/{peer}")
        assert [attempt[0] for attempt in caught.value.attempts] == [address]


@pytest.mark.parametrize(
    "address", ["/ip4/127.0.0.1/tcp/1", "", "/p2p/x", "/ip4/127.0.0.1/tcp/1/p2p/x", "/unix/a/p2p/"]
)
async def test_an_address_that_cannot_be_dialled_is_a_dial_error(address: str) -> None:
    async with a_host(listen=[]) as host:
        with pytest.raises(DialError):
            await host.connect(address)


async def test_a_host_does_not_dial_itself() -> None:
    async with a_host() as host:
        with pytest.raises(DialError, match="own"):
            await host.connect(host.addresses[0])


async def test_a_cancelled_dial_leaves_no_socket() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    try:
        async with a_host(listen=[]) as host:
            before = open_sockets()
            with trio.move_on_after(0.05) as scope:
                await host.connect(
                    f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
                )
            assert scope.cancelled_caught
            await trio.testing.wait_all_tasks_blocked()
            assert open_sockets() == before
    finally:
        silent.close()


# Limits


def is_closed(client: socket.socket) -> bool:
    """Whether the other side left; reads what it has sent so far."""
    client.setblocking(False)
    try:
        while client.recv(1000):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


async def silent_clients(host: MeshHost, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Sockets that connect and say nothing, accepted one after the other."""
    port = int(host.addresses[0].split("/")[4])
    clients = []
    for _ in range(count):
        clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
        await trio.testing.wait_all_tasks_blocked(0.01)
    return clients


async def test_the_oldest_unproven_sockets_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattica.net.transport.MAX_HANDSHAKES", 3)
    async with a_host() as host:
        with contextlib.ExitStack() as stack:
            clients = await silent_clients(host, 5, stack)
            assert [is_closed(client) for client in clients] == [True, True, False, False, False]


async def test_a_socket_that_never_proves_who_it_is_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattica.net.transport.HANDSHAKE_TIMEOUT_SECONDS", 0.05)
    async with a_host() as host:
        with contextlib.ExitStack() as stack:
            (client,) = await silent_clients(host, 1, stack)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert is_closed(client)


async def test_connections_beyond_the_limit_are_refused_and_those_within_stay() -> None:
    async with a_host(max_connections=2) as host, a_host() as one, a_host() as two, a_host() as three:
        host.serve("/lattica/echo", echo)
        await one.connect(host.addresses[0])
        stream = await one.open_stream(host.peer_id, ["/lattica/echo"])
        await two.connect(host.addresses[0])
        with contextlib.suppress(DialError, StreamError):  # refused before or after its side is done
            await three.connect(host.addresses[0])
            await three.ping(host.peer_id)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert {peer.peer_id for peer in host.peers()} == {one.peer_id, two.peer_id}
        await stream.send_all(b"still")
        assert await stream.receive_some() == b"still"


async def test_one_peer_cannot_take_all_connections() -> None:
    identity = Identity.generate()
    async with a_host() as host, contextlib.AsyncExitStack() as stack:
        for _ in range(MAX_CONNECTIONS_PER_PEER + 2):
            same = await stack.enter_async_context(a_host(identity=identity))
            await same.connect(host.addresses[0])
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(host.connections(identity.peer_id)) == MAX_CONNECTIONS_PER_PEER


async def test_the_gate_sees_every_lattica_stream_and_no_other() -> None:
    asked: list[tuple[PeerId, str]] = []

    def gate(peer: PeerId, protocol: str) -> bool:
        asked.append((peer, protocol))
        return protocol != "/lattica/closed"

    reached: list[str] = []

    async def note(stream: Stream) -> None:
        reached.append(stream.protocol)

    async with a_host(gate=gate) as host, a_host() as other:
        for protocol in ("/lattica/open", "/lattica/closed", "/other"):
            host.serve(protocol, note)
        await other.connect(host.addresses[0])
        for protocol in ("/lattica/open", "/lattica/closed", "/other"):
            with contextlib.suppress(StreamError):
                await (await other.open_stream(host.peer_id, [protocol])).receive_some()
        await other.ping(host.peer_id)
    assert asked == [(other.peer_id, "/lattica/open"), (other.peer_id, "/lattica/closed")]
    assert reached == ["/lattica/open", "/other"]


async def test_a_protocol_is_served_once() -> None:
    async with a_host() as host:
        host.serve("/lattica/echo", echo)
        with pytest.raises(LocalProtocolError, match="/lattica/echo"):
            host.serve("/lattica/echo", echo)
        host.unserve("/lattica/echo")
        host.serve("/lattica/echo", echo)


# Closing


async def test_a_closed_host_leaves_no_socket_and_no_task() -> None:
    before = open_sockets()
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with a_host() as one, a_host() as two:
        two.serve("/lattica/echo", echo)
        await one.connect(two.addresses[0])
        await one.open_stream(two.peer_id, ["/lattica/echo"])
        assert open_sockets() > before
    assert open_sockets() == before
    assert trio.lowlevel.current_statistics().tasks_living == tasks


@pytest.mark.parametrize("checkpoints", range(12))
async def test_a_start_that_is_cancelled_half_way_leaves_nothing(checkpoints: int) -> None:
    before, tasks = open_sockets(), trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            async with a_host(listen=[LOOPBACK, LOOPBACK]):
                await trio.sleep_forever()

        nursery.start_soon(run)
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert open_sockets() == before
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_an_error_in_the_block_comes_out_as_itself() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with a_host():
            raise KeyError("mine")


async def test_what_was_sent_before_closing_still_arrives() -> None:
    got = bytearray()
    done = trio.Event()

    async def take(stream: Stream) -> None:
        try:
            while data := await stream.receive_some():
                got.extend(data)
        finally:
            done.set()

    async with a_host() as host:
        host.serve("/lattica/take", take)
        async with a_host() as other:
            await other.connect(host.addresses[0])
            stream = await other.open_stream(host.peer_id, ["/lattica/take"])
            await stream.send_all(bytes(200_000))
            await stream.aclose()
        await done.wait()
    assert len(got) == 200_000


async def test_bytes_that_arrived_before_the_loss_are_read_and_then_the_loss() -> None:
    go_on = trio.Event()
    got: list[bytes] = []

    async def read_late(stream: Stream) -> None:
        await go_on.wait()
        got.append(await stream.receive_some())
        with pytest.raises(StreamError, match="lost"):
            await stream.receive_some()

    async with a_host() as host:
        host.serve("/lattica/late", read_late)
        async with a_host() as other:
            await other.connect(host.addresses[0])
            stream = await other.open_stream(host.peer_id, ["/lattica/late"])
            await stream.send_all(b"last words")
        while host.peers():  # noqa: ASYNC110  # a real socket's end
            await trio.sleep(0.001)
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
    assert got == [b"last words"]
