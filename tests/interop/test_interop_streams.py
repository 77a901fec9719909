"""Streams with go-, rust- and js-libp2p: bulk data, ends, resets, and many at once."""

from __future__ import annotations

import json

import pytest
import trio
from interop_peers import (
    ECHO,
    SINK,
    SOURCE,
    Pair,
    PeerError,
    RunPeer,
    connected,
    pattern,
    read_all,
    read_exactly,
    send_and_end,
    sha256,
    until,
)

from lattica.errors import StreamError
from lattica.net.api import Stream

pytestmark = [pytest.mark.interop, pytest.mark.slow]

both_dial = pytest.mark.parametrize("we_dial", [True, False], ids=["we-dial", "they-dial"])
both_open = pytest.mark.parametrize("we_open", [True, False], ids=["we-open", "they-open"])

MIB = 1 << 20
BULK_BYTES = 16 * MIB
DATA = pattern(BULK_BYTES)
JS_INBOUND_STREAMS = 32  # js-libp2p's default for one protocol and connection
SECOND_ECHO = "/interop/echo/2.0.0"


# Bulk


@both_dial
async def test_16_mib_come_back_from_their_echo(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        stream = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, stream, DATA)
            received = await read_all(stream)
        print(f"{BULK_BYTES / MIB / (trio.current_time() - start):.0f} MiB/s each way")  # shown by -rP
        assert len(received) == BULK_BYTES
        assert sha256(received) == sha256(DATA)


@both_dial
async def test_16_mib_come_back_from_our_echo(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        result = await pair.other.do("echo", peer=pair.ours.peer_id, bytes=BULK_BYTES)
        assert result["bytes"] == BULK_BYTES
        assert result["sent"] == result["received"] == sha256(DATA)
        print(f"{BULK_BYTES / MIB / result['seconds']:.0f} MiB/s each way")


@both_dial
async def test_each_direction_alone_carries_16_mib(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        peer, us = pair.other.peer_id, pair.ours.peer_id

        to_them = await pair.ours.open_stream(peer, [SINK])
        await send_and_end(to_them, DATA)
        assert (await read_all(to_them)).hex() == sha256(DATA)

        from_them = await pair.ours.open_stream(peer, [SOURCE])
        await send_and_end(from_them, BULK_BYTES.to_bytes(8, "big"))
        assert sha256(await read_all(from_them)) == sha256(DATA)

        result = await pair.other.do("sink", peer=us, bytes=BULK_BYTES)
        assert result["sent"] == result["received"] == sha256(DATA)
        result = await pair.other.do("source", peer=us, bytes=BULK_BYTES)
        assert (result["bytes"], result["received"]) == (BULK_BYTES, sha256(DATA))


@both_open
async def test_a_slow_reader_loses_nothing_and_stops_nobody_else(run_other: RunPeer, we_open: bool) -> None:
    """More than a window waits on one stream, unread at either end, while others go on."""
    text = "0123456789abcdef" * (MIB // 16)
    async with connected(run_other, we_dial=True) as pair:
        stream, number = await pair.open_held(we_open=we_open)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, stream, text.encode())
            nursery.start_soon(write_and_end, pair, number, text)
            assert await pair.ours.ping(pair.other.peer_id) < 10
            assert (await echo_once(pair, b"beside it")) == b"beside it"
            assert (await pair.other.do("echo", peer=pair.ours.peer_id, bytes=1000))["bytes"] == 1000
            assert await read_all(stream) == text.encode()
            heard = await pair.other.do("read", stream=number, bytes=len(text) + 1)
            assert heard == {"text": text, "ended": True}


# Ends and resets


@both_dial
async def test_after_our_end_we_still_hear_them(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        for we_open in (True, False):
            stream, number = await pair.open_held(we_open=we_open)
            await send_and_end(stream, b"question")
            assert await pair.other.do("read", stream=number, bytes=100) == {
                "text": "question",
                "ended": True,
            }
            await pair.other.do("write", stream=number, text="ans")
            assert await read_exactly(stream, 3) == b"ans"
            await pair.other.do("write", stream=number, text="wer")
            await pair.other.do("end", stream=number)
            assert await read_all(stream) == b"wer"


@both_dial
async def test_after_their_end_they_still_hear_us(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        for we_open in (True, False):
            stream, number = await pair.open_held(we_open=we_open)
            await pair.other.do("write", stream=number, text="question")
            await pair.other.do("end", stream=number)
            assert await read_all(stream) == b"question"
            await stream.send_all(b"ans")
            assert await pair.other.do("read", stream=number, bytes=3) == {"text": "ans", "ended": False}
            await send_and_end(stream, b"wer")
            assert await pair.other.do("read", stream=number, bytes=100) == {"text": "wer", "ended": True}


@both_dial
async def test_our_reset_is_an_error_for_them(run_other: RunPeer, language: str, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        for we_open in (True, False):
            stream, number = await pair.open_held(we_open=we_open)
            await stream.send_all(b"half")
            assert (await pair.other.do("read", stream=number, bytes=4))["text"] == "half"
            stream.reset()
            with pytest.raises(StreamError):
                await stream.receive_some()
            if language == "rust":  # yamux 0.14 reads a reset as an end; only a write tells the difference
                assert await pair.other.do("read", stream=number, bytes=1) == {"text": "", "ended": True}
            else:
                with pytest.raises(PeerError, match="reset"):
                    await pair.other.do("read", stream=number, bytes=1)
            with pytest.raises(PeerError):
                await pair.other.do("write", stream=number, text="into nothing")
            assert await echo_once(pair, b"the connection stays") == b"the connection stays"


@both_dial
async def test_their_reset_is_an_error_for_us(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        for we_open in (True, False):
            stream, number = await pair.open_held(we_open=we_open)
            await pair.other.do("write", stream=number, text="half")
            assert await read_exactly(stream, 4) == b"half"
            broke = trio.Event()
            stream.on_break(broke.set)
            await pair.other.do("reset", stream=number)
            await broke.wait()
            with pytest.raises(StreamError, match="reset"):
                await stream.receive_some()
            with pytest.raises(StreamError, match="reset"):
                await stream.send_all(b"into nothing")
            assert await echo_once(pair, b"the connection stays") == b"the connection stays"


@both_open
async def test_our_reset_ends_a_write_that_waits_for_us(run_other: RunPeer, we_open: bool) -> None:
    async with connected(run_other, we_dial=True) as pair:
        stream, number = await pair.open_held(we_open=we_open)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(PeerError):
                    while True:  # js-libp2p takes the first mebibyte into a buffer of its own
                        await pair.other.do("write", stream=number, text="x" * MIB)

            nursery.start_soon(write)
            await read_exactly(stream, 1)
            stream.reset()


# Many at once


@both_dial
@pytest.mark.parametrize(("count", "raised"), [(64, False), (256, True)], ids=["64", "256-raised"])
async def test_we_open_many_streams_at_once(
    run_other: RunPeer, language: str, we_dial: bool, count: int, raised: bool
) -> None:
    async with connected(run_other, we_dial=we_dial, raised_limits=raised) as pair:
        await pair.other.do("serve", protocol=SECOND_ECHO)
        spread = [ECHO, SECOND_ECHO] if language == "js" and not raised else [ECHO]
        assert raised or count <= JS_INBOUND_STREAMS * 2
        meeting = Meeting(count)

        async def talk(number: int) -> None:
            stream = await pair.ours.open_stream(pair.other.peer_id, [spread[number % len(spread)]])
            await converse(stream, number, meeting)

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(talk, number)
        assert meeting.most == count


@both_dial
@pytest.mark.parametrize(("count", "raised"), [(64, False), (256, True)], ids=["64", "256-raised"])
async def test_they_open_many_streams_at_once(
    run_other: RunPeer, we_dial: bool, count: int, raised: bool
) -> None:
    async with connected(run_other, we_dial=we_dial, raised_limits=raised) as pair:
        meeting = Meeting(count)

        async def talk(number: int) -> None:
            stream = (await pair.other.do("open", peer=pair.ours.peer_id, protocol=ECHO))["stream"]
            for text in (f"first {number}", f"second {number}"):
                await pair.other.do("write", stream=stream, text=text)
                heard = await pair.other.do("read", stream=stream, bytes=len(text))
                assert heard == {"text": text, "ended": False}
                await meeting.all_here()
            await pair.other.do("end", stream=stream)
            assert await pair.other.do("read", stream=stream, bytes=1) == {"text": "", "ended": True}

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(talk, number)


async def test_streams_beyond_their_limit_are_refused_and_the_rest_go_on(
    run_other: RunPeer, language: str
) -> None:
    """js takes 32 of a protocol, go 64 and more by its memory, rust 512 of all."""
    async with connected(run_other, we_dial=True) as pair:
        accepted = refused = 0
        asked = trio.Event()

        async def talk(number: int) -> None:
            nonlocal accepted, refused
            try:
                stream = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
                await stream.send_all(str(number).encode())
                assert await read_exactly(stream, len(str(number))) == str(number).encode()
            except StreamError:
                refused += 1
            else:
                accepted += 1
            if accepted + refused == 200:
                asked.set()
            await asked.wait()

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(talk, number)
        assert accepted >= {"js": JS_INBOUND_STREAMS, "go": 64, "rust": 200}[language]
        if language == "js":
            assert refused
        assert len(pair.ours.connections()) == 1
        await pair.ours.ping(pair.other.peer_id)


async def test_the_stream_that_is_one_too_many_errs_and_the_others_stay(
    run_other: RunPeer, language: str
) -> None:
    """js and go reset it. rust answers with GO_AWAY and nothing else: a later one takes a new connection."""
    async with connected(run_other, we_dial=True) as pair:
        streams: list[Stream] = []
        with pytest.raises(StreamError):
            while len(streams) < 4096:
                stream: Stream = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
                await stream.send_all(b"one more")
                assert await read_exactly(stream, 8) == b"one more"
                streams.append(stream)
        if language == "js":
            assert len(streams) == JS_INBOUND_STREAMS
        for stream in (streams[0], streams[-1]):
            await stream.send_all(b"still here")
            assert await read_exactly(stream, 10) == b"still here"
        if language == "rust":
            assert await echo_once(pair, b"elsewhere") == b"elsewhere"
            assert len(pair.ours.connections()) == 2


async def test_a_protocol_that_they_do_not_speak_is_refused(run_other: RunPeer) -> None:
    async with connected(run_other, we_dial=True) as pair:
        await until(lambda: pair.ours.peers()[0].protocols)  # else the first read would tell
        with pytest.raises(StreamError, match="does not speak /interop/unknown"):
            await pair.ours.open_stream(pair.other.peer_id, ["/interop/unknown"])
        stream = await pair.ours.open_stream(pair.other.peer_id, ["/interop/unknown", ECHO])
        assert stream.protocol == ECHO
        assert await converse_once(stream, b"the second wish") == b"the second wish"


async def test_a_protocol_that_we_do_not_speak_is_refused(run_other: RunPeer) -> None:
    async with connected(run_other, we_dial=True) as pair:
        with pytest.raises(PeerError):
            opened = await pair.other.do("open", peer=pair.ours.peer_id, protocol="/interop/unknown")
            await pair.other.do("write", stream=opened["stream"], text="lazy")
            await pair.other.do("read", stream=opened["stream"], bytes=1)
        assert (await pair.other.do("echo", peer=pair.ours.peer_id, bytes=10))["bytes"] == 10


class Meeting:
    """Lets tasks go on only when all have arrived: proof that all their streams were open at once."""

    def __init__(self, size: int) -> None:
        self.most = 0
        self._size = size
        self._waiting = trio.lowlevel.ParkingLot()

    async def all_here(self) -> None:
        self.most = max(self.most, len(self._waiting) + 1)
        if len(self._waiting) + 1 == self._size:
            self._waiting.unpark_all()
        else:
            await self._waiting.park()


async def converse(stream: Stream, number: int, meeting: Meeting) -> None:
    for text in (json.dumps({"first": number}).encode(), pattern(10_000 + number)):
        await stream.send_all(text)
        assert await read_exactly(stream, len(text)) == text
        await meeting.all_here()
    await stream.send_eof()
    assert await read_all(stream) == b""


async def converse_once(stream: Stream, data: bytes) -> bytes:
    await send_and_end(stream, data)
    return await read_all(stream)


async def echo_once(pair: Pair, data: bytes) -> bytes:
    return await converse_once(await pair.ours.open_stream(pair.other.peer_id, [ECHO]), data)


async def write_and_end(pair: Pair, number: int, text: str) -> None:
    await pair.other.do("write", stream=number, text=text)
    await pair.other.do("end", stream=number)
