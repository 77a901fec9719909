"""Edges at which implementations differ: pieces of frames, windows, Yamux pings, lazy negotiation, early data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from random import Random

import pytest
import trio
from interop_peers import (
    ECHO,
    HOLD,
    LIMIT_SECONDS,
    SINK,
    SOURCE,
    Pair,
    RunPeer,
    connected,
    pattern,
    read_all,
    read_exactly,
    run_ours,
    send_and_end,
    sha256,
    until,
)

from lattica.errors import StreamError

pytestmark = [pytest.mark.interop, pytest.mark.slow]

both_dial = pytest.mark.parametrize("we_dial", [True, False], ids=["we-dial", "they-dial"])
by_go = pytest.mark.parametrize("language", ["go"], indirect=True)  # whose sizes alone can be set
by_go_and_js = pytest.mark.parametrize("language", ["go", "js"], indirect=True)
MIB = 1 << 20
WINDOW_BYTES = 256 * 1024  # of a new stream
GHOST = "/interop/ghost/1.0.0"  # which nobody serves


# Pieces


@both_dial
async def test_frames_in_pieces_of_a_few_bytes_are_put_together(run_other: RunPeer, we_dial: bool) -> None:
    """A line that cuts everything: the handshake byte by byte, then records and frames anywhere."""
    with trio.fail_after(LIMIT_SECONDS):
        async with run_ours() as (ours, held), run_other() as other:
            if we_dial:
                async with chopped(other.address) as address:
                    await ours.connect(address)
                    await talk(Pair(ours, held, other))
            else:
                async with chopped(ours.addresses[0]) as address:
                    await other.do("dial", address=address)
                    await talk(Pair(ours, held, other))


async def talk(pair: Pair) -> None:
    await until(pair.ours.peers)
    await pair.other.event("identified")
    data = pattern(200_000)
    assert await echo(pair, data) == data
    result = await pair.other.do("echo", peer=pair.ours.peer_id, bytes=200_000)
    assert result["sent"] == result["received"] == sha256(data)
    await pair.ours.ping(pair.other.peer_id)
    await pair.other.do("ping", peer=pair.ours.peer_id)


@by_go
@pytest.mark.parametrize("frame_bytes", [1024, MIB], ids=["1 KiB", "1 MiB"])
async def test_data_frames_of_other_sizes_are_taken(run_other: RunPeer, frame_bytes: int) -> None:
    """One write of 2 MiB: frames as large as that allows, and as our window does (256 KiB at first)."""
    text = "0123456789abcdef" * (2 * MIB // 16)
    async with connected(run_other, we_dial=True, frame_bytes=frame_bytes) as pair:
        stream, number = await pair.they_open_held()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pair.other.do, "write", stream=number, text=text))
            assert await read_exactly(stream, len(text)) == text.encode()


# Windows


@both_dial
async def test_windows_that_grow_are_used_and_respected(run_other: RunPeer, we_dial: bool) -> None:
    """go's streams start with 8 MiB here, rust's and js's grow; ours grow in every case."""
    async with connected(run_other, we_dial=we_dial, window_bytes=8 * MIB) as pair:
        data = pattern(24 * MIB)
        sink = await pair.ours.open_stream(pair.other.peer_id, [SINK])
        await send_and_end(sink, data)
        assert (await read_all(sink)).hex() == sha256(data)
        result = await pair.other.do("sink", peer=pair.ours.peer_id, bytes=24 * MIB)
        assert result["received"] == sha256(data)


@by_go
async def test_a_window_larger_than_the_first_takes_that_much_unread(run_other: RunPeer) -> None:
    async with connected(run_other, we_dial=True, window_bytes=4 * MIB) as pair:
        stream, number = await pair.we_open_held()
        await stream.send_all(b"x" * (3 * MIB))  # returns only when there was room for it
        await stream.send_eof()
        heard = await pair.other.do("read", stream=number, bytes=4 * MIB)
        assert heard == {"text": "x" * (3 * MIB), "ended": True}


@pytest.mark.parametrize("we_send", [True, False], ids=["we-send", "they-send"])
async def test_streams_opened_and_filled_before_any_answer_arrive_whole(
    run_other: RunPeer, we_send: bool
) -> None:
    """A first window's worth on many streams, none of them read before all were sent."""
    size, count = 200_000, 20
    async with connected(run_other, we_dial=True) as pair:
        if we_send:
            numbers = []
            for _ in range(count):
                stream, number = await pair.we_open_held()
                numbers.append(number)
                await send_and_end(stream, b"y" * size)
            for number in numbers:
                heard = await pair.other.do("read", stream=number, bytes=size + 1)
                assert heard == {"text": "y" * size, "ended": True}
        else:
            streams = []
            for _ in range(count):
                stream, number = await pair.they_open_held()
                streams.append(stream)
                await pair.other.do("write", stream=number, text="y" * size)
                await pair.other.do("end", stream=number)
            for stream in streams:
                assert await read_all(stream) == b"y" * size


# Yamux pings


@by_go_and_js  # rust pings over Yamux by itself and cannot be asked to
@both_dial
async def test_yamux_pings_are_answered_beside_bulk_data(
    run_other: RunPeer, language: str, we_dial: bool
) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        stream = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
        data = pattern(4 * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, stream, data)
            for _ in range(20):
                assert (await pair.other.do("ping muxer", peer=pair.ours.peer_id))["seconds"] < 10
            assert await read_all(stream) == data


@both_dial
async def test_our_yamux_pings_are_answered(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        (connection,) = pair.ours.connections()
        await until(lambda: connection.mux.rtt is not None)
        rtt = connection.mux.rtt
        assert rtt is not None
        assert 0 < rtt < 10


# Lazy negotiation


async def known_to_speak(pair: Pair) -> None:
    """Wait until identify has told us what they speak: from then on we negotiate lazily."""
    await until(lambda: ECHO in pair.ours.peers()[0].protocols)


@both_dial
async def test_a_lazy_stream_carries_data_with_its_proposal(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        await known_to_speak(pair)
        for size in (0, 1, 100, 300_000):  # the last one is more than a window
            data = pattern(size)
            assert await echo(pair, data) == data


@both_dial
async def test_a_lazy_stream_that_only_sends_arrives(run_other: RunPeer, we_dial: bool) -> None:
    """Proposal, data and end leave together, and nobody here ever reads."""
    async with connected(run_other, we_dial=we_dial) as pair:
        await known_to_speak(pair)
        for text in ("a", "b" * 1000, "c" * 200_000):
            stream = await pair.ours.open_stream(pair.other.peer_id, [HOLD])
            await stream.send_all(text.encode())
            await stream.aclose()
            number = (await pair.other.event("stream"))["stream"]
            assert await pair.other.do("read", stream=number, bytes=len(text) + 1) == {
                "text": text,
                "ended": True,
            }


@both_dial
async def test_a_lazy_stream_may_be_read_when_its_window_is_full(run_other: RunPeer, we_dial: bool) -> None:
    """The first read takes the agreement and a window's worth of data: it has to say that there is room again."""
    async with connected(run_other, we_dial=we_dial) as pair:
        await known_to_speak(pair)
        stream = await pair.ours.open_stream(pair.other.peer_id, [SOURCE])
        await send_and_end(stream, (4 * MIB).to_bytes(8, "big"))
        (connection,) = pair.ours.connections()
        await until(lambda: connection.mux.unread_bytes >= WINDOW_BYTES)
        with trio.fail_after(10):  # a keepalive would free it after 15
            assert sha256(await read_all(stream)) == sha256(pattern(4 * MIB))


@both_dial
async def test_a_lazy_stream_that_sends_nothing_still_hears_them(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        await known_to_speak(pair)
        stream = await pair.ours.open_stream(pair.other.peer_id, [HOLD])
        number = (await pair.other.event("stream"))["stream"]
        await pair.other.do("write", stream=number, text="you first")
        assert await read_exactly(stream, 9) == b"you first"


@both_dial
async def test_a_lazy_stream_that_is_refused_says_so_at_the_first_read(
    run_other: RunPeer, we_dial: bool
) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        await known_to_speak(pair)
        (connection,) = pair.ours.connections()
        connection.spoken |= {GHOST}  # as if they had stopped serving it since they told us
        stream = await pair.ours.open_stream(pair.other.peer_id, [GHOST])
        await stream.send_all(b"for nobody")
        with pytest.raises(StreamError):
            await stream.receive_some()
        data = pattern(1000)
        assert await echo(pair, data) == data


@both_dial
async def test_lazy_streams_that_are_dropped_at_once_cost_nothing(run_other: RunPeer, we_dial: bool) -> None:
    """Reset before the answer came, closed before it, or never used: more of each than any limit of theirs."""
    async with connected(run_other, we_dial=we_dial) as pair:
        await known_to_speak(pair)
        for _ in range(100):
            (await pair.ours.open_stream(pair.other.peer_id, [ECHO])).reset()
            closed = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
            await closed.aclose()
            await pair.ours.ping(pair.other.peer_id)  # a round trip: theirs are over too
        (connection,) = pair.ours.connections()
        await until(lambda: connection.mux.inbound_streams <= 3)
        data = pattern(1000)
        assert await echo(pair, data) == data


@both_dial
async def test_their_lazy_streams_are_understood(run_other: RunPeer, we_dial: bool) -> None:
    """go and js propose lazily when they know us; rust when told to: greeting, proposal and data in one piece."""
    async with connected(run_other, we_dial=we_dial, lazy=True) as pair:
        await pair.other.event("identified")
        for size in (1, 1000, 300_000):
            result = await pair.other.do("echo", peer=pair.ours.peer_id, bytes=size)
            assert result["sent"] == result["received"] == sha256(pattern(size))
            result = await pair.other.do("sink", peer=pair.ours.peer_id, bytes=size)
            assert result["received"] == sha256(pattern(size))
        stream, _ = await pair.they_open_held()
        await send_and_end(stream, b"")


# Early data


@both_dial
async def test_streams_opened_with_the_connection_work(run_other: RunPeer, we_dial: bool) -> None:
    """Before identify has said anything, from both sides at once."""
    with trio.fail_after(LIMIT_SECONDS):
        async with run_ours() as (ours, held), run_other() as other:
            pair = Pair(ours, held, other)
            data = pattern(MIB)
            if we_dial:
                await ours.connect(other.address)
            else:
                await other.do("dial", address=ours.addresses[0])
                await until(ours.peers)

            async def they() -> None:
                await other.event("connected")
                result = await other.do("echo", peer=ours.peer_id, bytes=MIB)
                assert result["received"] == sha256(data)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(they)
                assert await echo(pair, data) == data


async def test_both_may_dial_at_once(run_other: RunPeer) -> None:
    """Two connections or one: every stream finds its way."""
    with trio.fail_after(LIMIT_SECONDS):
        async with run_ours() as (ours, held), run_other() as other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.connect, other.address)
                await other.do("dial", address=ours.addresses[0])
            pair, data = Pair(ours, held, other), pattern(MIB)
            assert await echo(pair, data) == data
            result = await other.do("echo", peer=ours.peer_id, bytes=MIB)
            assert result["received"] == sha256(data)


async def echo(pair: Pair, data: bytes) -> bytes:
    """What comes back from their echo."""
    stream = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, stream, data)
        return await read_all(stream)


@asynccontextmanager
async def chopped(address: str) -> AsyncIterator[str]:
    """The same peer behind a TCP proxy that hands on a few bytes at a time, differently cut each time."""
    random = Random(7)
    _, _, ip, _, port, _, peer = address.split("/")

    async def carry(source: trio.SocketStream, target: trio.SocketStream) -> None:
        carried = 0
        while data := await source.receive_some(65_536):
            while data:
                size = 1 if carried < 600 else random.randrange(1, 2000)
                await target.send_all(data[:size])
                carried += len(data[:size])
                data = data[size:]
        await target.send_eof()

    async def serve(near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream(ip, int(port))
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(carry, near, far)
            nursery.start_soon(carry, far, near)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}/p2p/{peer}"
        nursery.cancel_scope.cancel()
