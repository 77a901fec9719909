"""What one caller does must not be felt by another: two processes, one connection."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import trio
from breaking import KIB, MIB, NodeProcess, node_process, open_client, until

import lattica

# Each interval that a pause could run into, shortened in both processes: a pause of PAUSE_SECONDS passes all of them
# several times.
INTERVALS = {
    "lattica.net.connection:PING_INTERVAL_SECONDS": 0.2,
    "lattica.net.connection:PING_SOONER_SECONDS": 0.1,
    "lattica.net.connection:PING_TIMEOUT_SECONDS": 0.7,
    "lattica.net.host:CHECK_SECONDS": 0.05,
    "lattica.net.handlers:HANDSHAKE_TIMEOUT_SECONDS": 0.7,
    "lattica.net.transport:HANDSHAKE_TIMEOUT_SECONDS": 0.7,
    "lattica.net.sockets:PING_TIMEOUT_SECONDS": 0.7,
    "lattica.net.attend:PING_IDLE_SECONDS": 0.7,
    "lattica.net.attend:IDENTIFY_TIMEOUT_SECONDS": 0.7,
}
PAUSE_SECONDS = 3.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One node for all tests of the module: each of them also shows that those before left it whole."""
    with node_process(tmp_path_factory.mktemp("server")) as found:
        yield found


async def test_a_handler_that_sleeps_3_s_delays_no_call_ping_or_new_connection(server: NodeProcess) -> None:
    async with open_client(server) as client, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(client.rpc.call, server.peer_id, "break.sleep", 3.0)
        await client.rpc.call(server.peer_id, "break.reach", "sleeping", 8)
        for number in range(20):
            assert await client.rpc.call(server.peer_id, "break.echo", number) == number
        for _ in range(3):
            await client.host.ping(server.peer_id)
        async with open_client(server) as newcomer:
            assert await newcomer.rpc.call(server.peer_id, "break.echo", "hello") == "hello"
        # All of that, and not one sleeper had woken up.
        assert await client.rpc.call(server.peer_id, "break.count", "slept") == 0


async def test_a_plain_handler_that_blocks_delays_no_other_call(server: NodeProcess) -> None:
    async with open_client(server) as client, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(client.rpc.call, server.peer_id, "break.block", 2.0)
        await client.rpc.call(server.peer_id, "break.reach", "blocking", 8)
        for number in range(20):
            assert await client.rpc.call(server.peer_id, "break.echo", number) == number
        assert await client.rpc.call(server.peer_id, "break.count", "blocked") == 0


async def test_a_stalled_stream_reader_loses_nothing_freezes_nothing_and_its_writer_is_not_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in INTERVALS.items():
        monkeypatch.setattr(name.replace(":", "."), value)
    total = 600  # 37 MiB: more than the largest windows of both directions
    with node_process(tmp_path, intervals=INTERVALS) as server:
        async with open_client(server) as client:
            async with client.rpc.stream(server.peer_id, "break.produce", total, 64 * KIB) as items:
                numbers = [(await items.__anext__())[0]]
                calls = 0
                with trio.move_on_after(PAUSE_SECONDS):
                    while True:
                        assert await client.rpc.call(server.peer_id, "break.echo", calls) == calls
                        calls += 1
                        await trio.sleep(0.05)
                assert calls > 1, "other calls stood still"
                produced = await client.rpc.call(server.peer_id, "break.count", "produce item")
                assert produced < total, "nothing held the writer back"
                numbers += [number async for number, _ in items]
            assert numbers == list(range(total))


async def test_a_stalled_handler_loses_nothing_freezes_nothing_and_its_writer_is_not_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in INTERVALS.items():
        monkeypatch.setattr(name.replace(":", "."), value)
    total, sent = 600, 0
    with node_process(tmp_path, intervals=INTERVALS) as server:
        async with (
            open_client(server) as client,
            client.rpc.stream(server.peer_id, "break.take_late", "late") as stream,
        ):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    nonlocal sent
                    for number in range(total):
                        await stream.send((number, bytes(64 * KIB)))
                        sent += 1

                nursery.start_soon(send)
                await client.rpc.call(server.peer_id, "break.reach", "late taken", 1)
                with trio.move_on_after(PAUSE_SECONDS):
                    for number in itertools.count():
                        assert await client.rpc.call(server.peer_id, "break.echo", number) == number
                        await trio.sleep(0.05)
                assert 0 < sent < total, "nothing held the writer back"
                assert await client.rpc.call(server.peer_id, "break.count", "late taken") == 1
                await client.rpc.call(server.peer_id, "break.set_gate", "late")
            assert await stream.result() == list(range(total))


async def test_a_generator_that_raises_half_way_arrives_as_its_items_then_the_error(
    server: NodeProcess,
) -> None:
    async with open_client(server) as client:
        numbers = []
        with pytest.raises(lattica.RemoteError) as raised:
            async with client.rpc.stream(server.peer_id, "break.fail_after", 1000, "out of luck") as items:
                async for number in items:
                    numbers.append(number)
        assert numbers == list(range(1000))
        assert (raised.value.code, raised.value.text) == ("ValueError", "out of luck")
        assert await client.rpc.call(server.peer_id, "break.count", "failed half way") == 1


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_failing_handler_runs_once(server: NodeProcess, idempotent: bool) -> None:
    async with open_client(server) as client:
        before = await client.rpc.call(server.peer_id, "break.count", "failed")
        with pytest.raises(lattica.RemoteError, match="no good"):
            await client.rpc.call(server.peer_id, "break.fail", "no good", idempotent=idempotent)
        assert await client.rpc.call(server.peer_id, "break.count", "failed") == before + 1


async def test_3000_calls_at_once_on_one_connection_are_all_answered(server: NodeProcess) -> None:
    total = 3000
    answers: list[int] = []
    async with open_client(server) as client:

        async def call(number: int) -> None:
            # Nobody is answered before the last has arrived, so that they are at once indeed.
            answers.append(await client.rpc.call(server.peer_id, "break.meet", number, total))

        async with trio.open_nursery() as nursery:
            for number in range(total):
                nursery.start_soon(call, number)
        assert sorted(answers) == list(range(total))
        assert len(client.host.connections(server.peer_id)) == 1  # type: ignore[attr-defined]
        assert await client.rpc.call(server.peer_id, "break.echo", 1) == 1


@pytest.mark.parametrize("direction", ["down", "up"])
async def test_small_calls_beside_a_saturating_stream_go_on_being_answered(
    server: NodeProcess, direction: str
) -> None:
    moved = 0
    async with open_client(server) as client, trio.open_nursery() as nursery:

        async def down() -> None:
            nonlocal moved
            async with client.rpc.stream(server.peer_id, "break.produce", 1 << 40, MIB) as items:
                async for _, body in items:
                    moved += len(body)

        async def up() -> None:
            nonlocal moved
            async with client.rpc.stream(server.peer_id, "break.drain") as stream:
                while True:
                    await stream.send(bytes(MIB))
                    moved += MIB

        nursery.start_soon(down if direction == "down" else up)

        async def flows() -> bool:
            return moved > 8 * MIB

        await until(flows)
        for number in range(100):
            at = moved
            assert await client.rpc.call(server.peer_id, "break.echo", number, timeout=5) == number

            async def goes_on(at: int = at) -> bool:
                return moved > at

            await until(goes_on)  # neither starves the other
        nursery.cancel_scope.cancel()
