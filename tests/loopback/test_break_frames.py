"""Peers that shake hands as they should and then misbehave: their stream or connection ends, the node lives.

Each test runs against the same node process, on a connection of its own; an honest client, connected before the first
of them, must be served after each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import trio
from breaking import KIB, MIB, NodeProcess, node_process, open_client, until
from stranger import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    GREETING,
    PING,
    RPC,
    SYN,
    WINDOW_UPDATE,
    Stranger,
    header,
    negotiation,
    request,
    rpc_frame,
    stranger,
    varint,
)

LIMIT_SECONDS = 10  # for the node to end what was broken
HANDSHAKE_SECONDS = 2.0  # in the node; a negotiation that stalls ends then
FORGED_BYTES = 16 * MIB  # what 500 forged lengths may cost, where they announce 60 MiB each

SHORTER = {
    "lattica.net.handlers:HANDSHAKE_TIMEOUT_SECONDS": HANDSHAKE_SECONDS,
    "lattica.net.attend:IDENTIFY_TIMEOUT_SECONDS": HANDSHAKE_SECONDS,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One node for all tests of the module: each of them also shows that those before left it whole."""
    with node_process(tmp_path_factory.mktemp("server"), intervals=SHORTER) as found:
        yield found
        log = found.log.read_text()
    assert "Traceback" not in log, log[-5000:]  # what a peer sends is never an error of ours


@asynccontextmanager
async def attacking(server: NodeProcess) -> AsyncIterator[Stranger]:
    """A stranger's connection; beside it an honest one, which must be served before, during and after."""
    async with open_client(server) as honest:
        assert await honest.rpc.call(server.peer_id, "break.echo", "before") == "before"
        with trio.fail_after(LIMIT_SECONDS):
            async with stranger(server.port) as attacker:
                yield attacker
                assert await honest.rpc.call(server.peer_id, "break.echo", "during") == "during"
        assert await honest.rpc.call(server.peer_id, "break.echo", "after") == "after"
        assert [peer.peer_id for peer in honest.peers()] == [server.peer_id]


# Calls


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def framed(array: bytes, section: bytes = b"") -> bytes:
    return varint(len(array)) + varint(len(section)) + array + section


def call_with(argument: bytes) -> bytes:
    """A request whose one argument is any bytes."""
    fields = b"\x96\x00" + msgpack.packb("break.echo") + b"\x91" + argument + msgpack.packb(None)
    return framed(fields + msgpack.packb("") + b"\xc2")


def tensor(dtype: object, shape: object, offset: object, size: object) -> bytes:
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb([dtype, shape, offset, size])))


BROKEN_CALLS = {
    "oversize array": varint(64 * MIB + 1) + varint(0) + bytes(100),
    "oversize section": varint(10) + varint(64 * MIB) + bytes(100),
    "a length of 35 bits": b"\xff\xff\xff\xff\x7f" + varint(0),
    "a length without end": b"\xff" * 100,
    "a length written the long way": b"\x8a\x00\x00" + bytes(20),
    "an empty frame": varint(0) + varint(0),
    "nested 33 deep": framed(nested(33)),
    "nested 100,000 deep": framed(nested(100_000)),
    "an argument nested 100,000 deep": call_with(nested(100_000)),
    "truncated msgpack": framed(msgpack.packb([0, "break.echo", [1], None, "", False])[:-3]),
    "two values in a frame": framed(msgpack.packb([4]) * 2),
    "an array of 2^32 - 1": framed(b"\xdd\xff\xff\xff\xff"),
    "a map of 2^32 - 1": framed(b"\xdf\xff\xff\xff\xff"),
    "a text of 2^32 - 1": framed(b"\xdb\xff\xff\xff\xff"),
    "bytes of 2^32 - 1": framed(b"\xc6\xff\xff\xff\xff"),
    "an extension of 2^32 - 1": framed(b"\xc9\xff\xff\xff\xff\x01"),
    "two million values": framed(b"\xdd\x00\x1e\x84\x80" + b"\xc0" * 2_000_000),
    "a text that is not UTF-8": call_with(b"\xa2\xff\xfe"),
    "a key that is no text": call_with(b"\x81\x01\x01"),
    "an unknown extension": call_with(msgpack.packb(msgpack.ExtType(77, b"x"))),
    "a tensor of 2^60 elements": call_with(tensor("float32", [1 << 30, 1 << 30], 0, 4)),
    "a tensor of negative shape": call_with(tensor("float32", [-1], 0, 4)),
    "a tensor outside the section": call_with(tensor("float32", [1 << 20], 0, 4 << 20)),
    "a tensor of objects": call_with(tensor("object", [1], 0, 8)),
    "a section that nothing names": framed(msgpack.packb([0, "break.echo", [1], None, "", False]), bytes(64)),
    "no array": rpc_frame({"method": "break.echo"}),
    "an empty array": rpc_frame([]),
    "an unknown kind": rpc_frame([9, 1]),
    "a kind that is no number": rpc_frame(["0", "break.echo", [], None, "", False]),
    "an item before a request": rpc_frame([1, "item"]),
    "an end before a request": rpc_frame([2, None]),
    "a failure from a caller": rpc_frame([3, "ValueError", "text", {}]),
    "an item behind a request without items": request("break.echo", 1) + rpc_frame([1, "item"]),
    "a request among items": request("break.drain", more=True) + request("break.echo", 1),
    "a timeout that is no number": rpc_frame([0, "break.echo", [1], float("nan"), "", False]),
    "a timeout below zero": rpc_frame([0, "break.echo", [1], -1, "", False]),
    "a method of 10,000 bytes": request("break." + "x" * 10_000),
    "arguments that are no list": rpc_frame([0, "break.echo", "args", None, "", False]),
    "a trace of 10,000 bytes": rpc_frame([0, "break.echo", [1], None, "x" * 10_000, False]),
    "random bytes": bytes(range(255, 0, -1)) * 40,
}


@pytest.mark.parametrize("data", BROKEN_CALLS.values(), ids=BROKEN_CALLS.keys())
async def test_a_broken_call_ends_its_stream_and_the_node_lives(server: NodeProcess, data: bytes) -> None:
    async with attacking(server) as attacker:
        stream = await attacker.open(RPC)
        await attacker.write_long(stream, data)
        assert await attacker.outcome(stream) in ("reset", "ended")
        assert await attacker.call("break.echo", "same connection") == "same connection"


@pytest.mark.parametrize("size", [1, 2, 5, 20])
async def test_a_call_cut_off_by_its_callers_end_is_not_made(server: NodeProcess, size: int) -> None:
    whole = request("break.fail", "never to be called")
    assert size < len(whole)
    async with attacking(server) as attacker:
        before = await attacker.call("break.count", "failed")
        stream = await attacker.open(RPC)
        await attacker.write(stream, whole[:size], flags=FIN)
        assert await attacker.outcome(stream) in ("reset", "ended")
        assert await attacker.call("break.count", "failed") == before


# Negotiation, identify, ping

BROKEN_NEGOTIATIONS = {
    "a message of 16 KiB": varint(16 * KIB) + bytes(100),
    "a length without end": b"\xff" * 100,
    "an empty message": b"\x00",
    "no line feed": b"\x05hello",
    "not UTF-8": b"\x03\xff\xfe\n",
    "another greeting": negotiation("/multistream/9.9.9"),
    "33 unknown protocols": negotiation(GREETING, *(f"/nobody/{number}" for number in range(33))),
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "half a message, then nothing": negotiation(GREETING)[:10],
    "a greeting, then nothing": negotiation(GREETING),
    "nothing": b"",
}


@pytest.mark.parametrize("data", BROKEN_NEGOTIATIONS.values(), ids=BROKEN_NEGOTIATIONS.keys())
@pytest.mark.parametrize("ends", [False, True], ids=["stays", "ends"])
async def test_a_broken_negotiation_ends_its_stream_and_the_node_lives(
    server: NodeProcess, data: bytes, ends: bool
) -> None:
    async with attacking(server) as attacker:
        stream = await attacker.open()
        await attacker.write(stream, data, flags=FIN if ends else 0)
        assert await attacker.outcome(stream) in ("reset", "ended")
        assert await attacker.call("break.echo", "same connection") == "same connection"


BROKEN_IDENTITIES = {
    "a length of 65 KiB": varint(65 * KIB) + bytes(100),
    "a length without end": b"\xff" * 100,
    "no protobuf": varint(100) + b"\xff" * 100,
    "a field of 2^32 bytes": varint(6) + b"\x0a\xff\xff\xff\xff\x0f",
    "somebody else's key": varint(38) + b"\x0a\x24\x08\x01\x12\x20" + bytes(range(32)),
    "a message cut off": varint(1000) + bytes(10),
    "100,000 addresses": varint(60_000) + b"\x12\x00" * 30_000,
    "agents that are no text": varint(12) + b"\x32\x0a" + b"\xff" * 10,
}


@pytest.mark.parametrize("data", BROKEN_IDENTITIES.values(), ids=BROKEN_IDENTITIES.keys())
@pytest.mark.parametrize("how", ["answered", "pushed"])
async def test_a_broken_identity_ends_its_stream_and_the_node_lives(
    server: NodeProcess, data: bytes, how: str
) -> None:
    async with attacking(server) as attacker:
        if how == "pushed":
            stream = await attacker.open("/ipfs/id/push/1.0.0")
        else:
            stream = await attacker.asked_for("/ipfs/id/1.0.0")
        await attacker.write(stream, data, flags=FIN)
        assert await attacker.outcome(stream) in ("reset", "ended")
        assert await attacker.call("break.echo", "same connection") == "same connection"


@pytest.mark.parametrize("answer", [b"x" * 32, b"", b"x" * 31], ids=["other bytes", "nothing", "too few"])
async def test_a_wrong_pong_ends_its_stream_and_the_node_lives(server: NodeProcess, answer: bytes) -> None:
    async with attacking(server) as attacker:
        question = await attacker.open(RPC)
        await attacker.write(question, request("break.ping", attacker.peer_id))
        stream = await attacker.asked_for("/ipfs/ping/1.0.0")
        await attacker.write(stream, answer, flags=FIN)
        assert await attacker.outcome(stream) in ("reset", "ended")
        assert b"no ping" in await attacker.read(question, 12)
        assert await attacker.call("break.echo", "same connection") == "same connection"


# Yamux and Noise: here the connection is what was broken


async def beyond_the_window(attacker: Stranger) -> None:
    stream = await attacker.open(RPC)
    await attacker.frame(DATA, 0, stream, length=0xFFFF_FFFF)


async def too_much_for_the_window(attacker: Stranger) -> None:
    """Items for a handler that reads one of them: the node grants no more than its window and what it reads ahead."""
    stream = await attacker.open(RPC)
    await attacker.write(stream, request("break.take_late", "too much", more=True))
    for number in range(64):
        await attacker.write(stream, rpc_frame([1, [number, bytes(30 * KIB)]]))


async def opened_twice(attacker: Stranger) -> None:
    stream = await attacker.open()
    await attacker.frame(WINDOW_UPDATE, SYN, stream, length=0)


async def a_window_of_4_gib(attacker: Stranger) -> None:
    stream = await attacker.open(RPC)
    for _ in range(2):
        await attacker.frame(WINDOW_UPDATE, 0, stream, length=0xFFFF_FFFF)


async def a_forged_record(attacker: Stranger) -> None:
    await attacker.send_raw((100).to_bytes(2, "big") + bytes(100))


async def a_record_replayed(attacker: Stranger) -> None:
    sealed = attacker.noise.encrypt(header(PING, SYN, 0, 1))
    await attacker.send_raw(2 * (len(sealed).to_bytes(2, "big") + sealed))


async def a_record_shorter_than_its_tag(attacker: Stranger) -> None:
    await attacker.send_raw((5).to_bytes(2, "big") + bytes(5))


def raw_frame(*fields: int, version: int = 0) -> Callable[[Stranger], Awaitable[None]]:
    async def send(attacker: Stranger) -> None:
        await attacker.send(header(*fields, version=version))

    return send


BROKEN_CONNECTIONS: dict[str, Callable[[Stranger], Awaitable[None]]] = {
    "another version": raw_frame(DATA, SYN, 1, 0, version=1),
    "an unknown type": raw_frame(9, 0, 1, 0),
    "data for stream 0": raw_frame(DATA, 0, 0, 10),
    "a stream id of the node's side": raw_frame(WINDOW_UPDATE, SYN, 2_000, 0),
    "a stream opened twice": opened_twice,
    "a frame of 4 GiB": beyond_the_window,
    "more than the window": too_much_for_the_window,
    "a window of 8 GiB": a_window_of_4_gib,
    "a forged record": a_forged_record,
    "a record replayed": a_record_replayed,
    "a record shorter than its tag": a_record_shorter_than_its_tag,
}


@pytest.mark.parametrize("attack", BROKEN_CONNECTIONS.values(), ids=BROKEN_CONNECTIONS.keys())
async def test_a_broken_connection_is_closed_and_the_node_lives(
    server: NodeProcess, attack: Callable[[Stranger], Awaitable[None]]
) -> None:
    async with attacking(server) as attacker:
        await attack(attacker)
        await attacker.until_closed()


async def unknown_stream(attacker: Stranger) -> None:
    await attacker.write(4_001, b"nobody opened this")
    await attacker.frame(WINDOW_UPDATE, 0, 4_001, length=1000)
    await attacker.frame(WINDOW_UPDATE, FIN, 4_001, length=0)


async def many_opened_and_reset(attacker: Stranger) -> None:
    for start in range(1, 20_000, 1_000):
        await attacker.send(
            b"".join(
                header(WINDOW_UPDATE, SYN, 2 * number + 1, 0) + header(WINDOW_UPDATE, 8, 2 * number + 1, 0)
                for number in range(start, start + 1_000)
            )
        )
    attacker._next = 50_001


async def answers_to_no_question(attacker: Stranger) -> None:
    for _ in range(100):
        await attacker.frame(PING, ACK, 0, length=12345)


@pytest.mark.parametrize("attack", [unknown_stream, answers_to_no_question])
async def test_odd_frames_that_break_no_rule_leave_the_connection_usable(
    server: NodeProcess, attack: Callable[[Stranger], Awaitable[None]]
) -> None:
    async with attacking(server) as attacker:
        await attack(attacker)
        assert await attacker.call("break.echo", "same connection") == "same connection"


async def going_away_and_staying(attacker: Stranger) -> None:
    await attacker.frame(GO_AWAY, 0, 0, length=0)
    stream = await attacker.open(RPC)
    await attacker.write(stream, request("break.hold", "wrong kind"))


async def pings_without_reading(attacker: Stranger) -> None:
    flood = header(PING, SYN, 0, 7) * 5_000
    for _ in range(100):  # 6 MB of pings; the kernel's buffers take some of the replies
        if attacker.closed:
            return
        with trio.move_on_after(0.5):
            await attacker.send(flood)


async def six_thousand_streams(attacker: Stranger) -> None:
    for start in range(0, 6_000, 1_000):
        numbers = range(start, start + 1_000)
        await attacker.send(b"".join(header(WINDOW_UPDATE, SYN, 2 * n + 1, 0) for n in numbers))


async def windows_filled(attacker: Stranger) -> None:
    """250 KiB each of calls that never become whole, on 500 streams: 122 MiB if the node held all of it."""
    piece = varint(60 * MIB) + varint(0) + bytes(50 * KIB)
    for _ in range(500):
        if attacker.closed:
            return
        stream = attacker._next
        attacker._next += 2
        await attacker.send(header(WINDOW_UPDATE, SYN, stream, 0))
        await attacker.write(stream, negotiation(GREETING, RPC) + piece)
        for _ in range(4):
            await attacker.write(stream, bytes(48 * KIB))


async def unread_items(attacker: Stranger) -> None:
    """240 KiB of items each for 500 handlers that read one of them: 117 MiB if the node held all of it."""
    items = b"".join(rpc_frame([1, [number, bytes(30 * KIB)]]) for number in range(8))
    for _ in range(500):
        stream = attacker._next
        attacker._next += 2
        await attacker.send(header(WINDOW_UPDATE, SYN, stream, 0))
        opening = negotiation(GREETING, RPC) + request("break.take_late", "never", more=True)
        await attacker.write(stream, opening)
        for at in range(0, len(items), 48 * KIB):
            await attacker.write(stream, items[at : at + 48 * KIB])


async def forged_lengths(attacker: Stranger) -> None:
    """500 frames of 60 MiB announced, 20 bytes of each sent: in the array, and in the section."""
    for number in range(500):
        lengths = (60 * MIB, 0) if number % 2 else (5, 60 * MIB)
        stream = attacker._next
        attacker._next += 2
        announced = varint(lengths[0]) + varint(lengths[1]) + bytes(20)
        await attacker.send(header(WINDOW_UPDATE, SYN, stream, 0))
        await attacker.write(stream, negotiation(GREETING, RPC) + announced)


FLOODS = {
    "opened and reset": (many_opened_and_reset, 24 * MIB),
    "pings without reading": (pings_without_reading, 24 * MIB),
    "6,000 streams": (six_thousand_streams, 48 * MIB),
    "going away and staying": (going_away_and_staying, 8 * MIB),
    "windows filled": (windows_filled, (64 + 40) * MIB),
    "unread items": (unread_items, (64 + 40) * MIB),
    "forged lengths": (forged_lengths, FORGED_BYTES),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_is_bounded_in_memory_and_gone_with_its_connection(
    server: NodeProcess, name: str
) -> None:
    attack, allowed = FLOODS[name]
    async with open_client(server) as honest:

        async def state() -> dict[str, int]:
            found: dict[str, int] = await honest.rpc.call(server.peer_id, "break.state")
            return found

        async def memory_of_server() -> int:
            found: int = await honest.rpc.call(server.peer_id, "break.memory")
            return found

        async def alone() -> bool:
            return (await state())["peers"] == 1

        await until(alone)
        before, memory = await state(), await memory_of_server()
        async with stranger(server.port) as attacker:
            await attack(attacker)
            assert await memory_of_server() - memory <= allowed  # while nobody reads what the node answers
            await attacker.settled()
            assert await memory_of_server() - memory <= allowed  # and with all of it read

        async def gone() -> bool:
            now = await state()
            return all(now[key] <= before[key] for key in ("peers", "sockets", "tasks"))

        await until(gone)
        assert await honest.rpc.call(server.peer_id, "break.echo", "after") == "after"


async def test_a_forged_length_never_allocates(tmp_path: Path) -> None:
    """Not even pages that nobody touches: 30 GB announced on one connection, counted by Python's own allocators."""
    with node_process(tmp_path) as server:
        async with open_client(server) as honest:

            async def peak() -> int:
                """The most bytes held at a time since this was asked last, above those held then."""
                found: int = await honest.rpc.call(server.peer_id, "break.trace_memory")
                return found

            await peak()
            async with stranger(server.port) as attacker:
                await attacker.call("break.echo", "what a connection costs")
                await peak()
                await forged_lengths(attacker)
                assert await attacker.call("break.count", "failed") == 0  # all of it has arrived
                assert await peak() <= FORGED_BYTES
