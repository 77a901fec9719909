"""Many peers over a node's life, honest and not: what they took comes back, and nobody else waits for them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from breaking import MIB, NodeProcess, node_process, open_client, until
from stranger import stranger

import lattica

LIVES = 2000  # of short-lived peers
AT_ONCE = 8
GROWTH_BYTES = 12 * MIB  # allowed for all of them: the addresses of peers are remembered, some bytes each
ATTACK_BYTES = 16 * MIB  # allowed while they are there
HOSTILE = 200  # clients at once
HANDSHAKE_SECONDS = 4.0  # in the node under attack, in place of 10


async def state_of(client: lattica.Node, server: NodeProcess) -> dict[str, int]:
    found: dict[str, int] = await client.rpc.call(server.peer_id, "break.state")
    return found


async def memory_of(client: lattica.Node, server: NodeProcess) -> int:
    found: int = await client.rpc.call(server.peer_id, "break.memory")
    return found


def back_to(
    before: dict[str, int], client: lattica.Node, server: NodeProcess
) -> Callable[[], Awaitable[bool]]:
    """Whether the node holds no more peers, sockets and tasks than before."""

    async def is_back() -> bool:
        now = await state_of(client, server)
        return all(now[key] <= before[key] for key in ("peers", "sockets", "descriptors", "tasks", "threads"))

    return is_back


async def test_2000_short_lived_peers_leave_slots_sockets_tasks_and_memory_as_they_were(
    tmp_path: Path,
) -> None:
    """More peers than the node takes connections (512), so that a slot which is not freed shows."""
    with node_process(tmp_path) as server:
        async with open_client(server) as client:

            async def live(lives: int) -> None:
                """One peer after the other: a new identity, a connection, a call, gone; every other one rudely."""
                for number in range(lives):
                    async with stranger(server.port) as peer:
                        assert await peer.call("break.echo", number) == number
                        if number % 2:
                            peer.hang_up_rudely()

            await live(100)  # what is allocated once
            await until(lambda: has_peers(client, server, 1))
            before, memory = await state_of(client, server), await memory_of(client, server)
            with trio.fail_after(120):
                async with trio.open_nursery() as nursery:
                    for _ in range(AT_ONCE):
                        nursery.start_soon(live, LIVES // AT_ONCE)
            await until(back_to(before, client, server))
            assert await memory_of(client, server) - memory <= GROWTH_BYTES


async def has_peers(client: lattica.Node, server: NodeProcess, number: int) -> bool:
    return (await state_of(client, server))["peers"] == number


async def test_nodes_that_come_and_go_leave_a_node_as_it_was(tmp_path: Path) -> None:
    """The same with whole nodes as peers, and in the process that opens them."""
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            before: dict[str, int] = {}
            for number in range(40):
                if number == 10:
                    before = await state_of(client, server)
                async with open_client(server) as newcomer:
                    assert await newcomer.rpc.call(server.peer_id, "break.echo", number) == number
            await until(back_to(before, client, server))


# On the listen port


async def garbage(port: int, number: int) -> None:
    """Bytes that are no protocol, of several kinds; then waits for the node to hang up."""
    kinds = [
        os.urandom(10_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 5_000,
        b"\x13/multistream/1.0.0\n\x07/noise\n" + os.urandom(5_000),
        b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(32),
        b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff",
    ]
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        try:
            await stream.send_all(kinds[number % len(kinds)])
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass  # reset: hung up, too


async def half_open(port: int, number: int, *, source: str = "127.0.0.1") -> None:
    """Connects and says nothing until the node hangs up."""
    stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=source)
    async with stream:
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass


async def slow_loris(port: int, number: int) -> None:
    """Says what it should, a byte at a time, until the node hangs up."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream, trio.open_nursery() as nursery:

        async def drip() -> None:
            try:
                for byte in itertools.cycle(b"\x13/multistream/1.0.0\n\x07/noise\n"):
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.2)
            except trio.BrokenResourceError:
                pass

        nursery.start_soon(drip)
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        nursery.cancel_scope.cancel()


async def test_200_garbage_half_open_and_slow_loris_clients_stop_no_service(tmp_path: Path) -> None:
    intervals = {"lattica.net.transport:HANDSHAKE_TIMEOUT_SECONDS": HANDSHAKE_SECONDS}
    hung_up = 0
    with node_process(tmp_path, intervals=intervals) as server:
        async with open_client(server) as client:
            async with open_client(server) as warm:
                assert await warm.rpc.call(server.peer_id, "break.echo", 1) == 1
            await until(lambda: has_peers(client, server, 1))
            before, memory = await state_of(client, server), await memory_of(client, server)

            async def attack(kind: Callable[[int, int], Awaitable[None]], number: int) -> None:
                nonlocal hung_up
                await kind(server.port, number)
                hung_up += 1

            async with trio.open_nursery() as nursery:
                for number in range(HOSTILE):
                    nursery.start_soon(attack, (garbage, half_open, slow_loris)[number % 3], number)
                served = 0
                while hung_up < HOSTILE:
                    assert await client.rpc.call(server.peer_id, "break.echo", served, timeout=5) == served
                    async with open_client(server) as newcomer:
                        answer = await newcomer.rpc.call(server.peer_id, "break.echo", served, timeout=5)
                        assert answer == served
                    assert await memory_of(client, server) - memory <= ATTACK_BYTES
                    served += 1
                assert served, "the attack was over before anybody new had come"
            # The node hung up on all 200 by itself, and nothing of them is left.
            await until(back_to(before, client, server))


async def test_a_crowd_of_one_address_that_comes_back_at_once_keeps_nobody_else_out(tmp_path: Path) -> None:
    """Silent clients that connect again as soon as they are thrown out, while a slow but honest one shakes hands."""
    thrown_out = 0
    few_places_long_held = {
        "lattica.net.transport:MAX_HANDSHAKES": 32,
        "lattica.net.transport:HANDSHAKE_TIMEOUT_SECONDS": 60,
    }
    with node_process(tmp_path, intervals=few_places_long_held) as server:
        async with open_client(server) as client, trio.open_nursery() as nursery:

            async def nag() -> None:
                nonlocal thrown_out
                while True:
                    await half_open(server.port, 0, source="127.0.0.2")
                    thrown_out += 1

            async def storm() -> None:
                """Until each place has been taken several times since the honest one got its own."""
                for _ in range(50):
                    nursery.start_soon(nag)
                with trio.fail_after(40):
                    while thrown_out < 200:  # noqa: ASYNC110  # tasks of this run count it
                        await trio.sleep(0.001)

            async with stranger(server.port, pause=storm) as honest:
                assert await honest.call("break.echo", "slow") == "slow"
            assert await client.rpc.call(server.peer_id, "break.echo", 1) == 1
            nursery.cancel_scope.cancel()
