"""Streams over a real connection, both ends in this process."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from lattica.errors import LocalProtocolError, StreamError
from lattica.net.api import Stream
from lattica.net.connection import MuxedConnection
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity
from lattica.net.stream import MuxedStream

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ECHO, HOLD = "/lattica/echo", "/lattica/hold"
WINDOW = 256 * 1024  # that a stream starts with


class Server:
    """Echoes, and holds what it is given to hold."""

    def __init__(self, host: MeshHost) -> None:
        self.host = host
        self.received = 0
        self._held: trio.MemoryReceiveChannel[Stream]
        self._hold, self._held = trio.open_memory_channel[Stream](100)
        self.released = trio.Event()
        host.serve(ECHO, self.echo)
        host.serve(HOLD, self.hold)
        host.serve("/lattica/sink", self.sink)
        host.serve("/lattica/deaf", self.deaf)

    async def echo(self, stream: Stream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)

    async def hold(self, stream: Stream) -> None:
        await self._hold.send(stream)
        await self.released.wait()

    async def deaf(self, stream: Stream) -> None:
        await self.released.wait()

    async def sink(self, stream: Stream) -> None:
        buffer = memoryview(bytearray(1 << 20))
        while size := await stream.receive_into(buffer):
            self.received += size

    async def held(self) -> MuxedStream:
        stream = await self._held.receive()
        assert isinstance(stream, MuxedStream)
        return stream


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Server, MeshHost]]:
    """A server and a client that knows what the server speaks."""
    async with (
        open_host(identity=Identity.generate(), listen=[LOOPBACK]) as host,
        open_host(identity=Identity.generate(), listen=[]) as client,
    ):
        server = Server(host)
        with trio.fail_after(20):
            await client.connect(host.addresses[0])
            while not connection(client).spoken:  # noqa: ASYNC110  # identify's answer tells nobody here
                await trio.sleep(0.001)
            yield server, client
            server.released.set()


def connection(host: MeshHost) -> MuxedConnection:
    (found,) = host.connections()
    return found


async def held_pair(server: Server, client: MeshHost) -> tuple[MuxedStream, MuxedStream]:
    """Both ends of one stream, ours first."""
    ours = await client.open_stream(server.host.peer_id, [HOLD])
    return ours, await server.held()


# Opening


async def test_a_known_protocol_is_opened_without_waiting_for_the_answer() -> None:
    async with connected() as (server, client):
        opening = client.open_stream(server.host.peer_id, ["/nobody/1", ECHO])
        with pytest.raises(StopIteration) as done:
            opening.send(None)  # one step: it must not have to wait for anything
        stream = done.value.value
        assert stream.protocol == ECHO
        assert stream.send_nowait([b"hello"])
        assert await stream.receive_some() == b"hello"


async def test_a_protocol_that_is_spoken_no_more_is_an_error_at_the_first_receive() -> None:
    async with connected() as (server, client):
        connection(client).spoken |= {"/gone"}
        stream = await client.open_stream(server.host.peer_id, ["/gone"])
        await stream.send_all(b"for nobody")
        with pytest.raises(StreamError, match="does not speak /gone"):
            await stream.receive_some()
        with pytest.raises(StreamError):
            await stream.send_all(b"more")


async def test_a_lone_protocol_is_tried_before_the_peer_has_said_what_it_speaks() -> None:
    async with connected() as (server, client):
        connection(client).spoken = frozenset()
        opening = client.open_stream(server.host.peer_id, [ECHO])
        with pytest.raises(StopIteration) as done:
            opening.send(None)
        await done.value.value.send_all(b"hello")
        assert await done.value.value.receive_some() == b"hello"


async def test_what_a_peer_does_not_list_is_asked_for_and_refused() -> None:
    async with connected() as (server, client):
        with pytest.raises(StreamError, match="does not speak /nobody"):
            await client.open_stream(server.host.peer_id, ["/nobody"])


async def test_a_stream_that_is_closed_before_its_answer_came_leaves_nothing() -> None:
    async with connected() as (server, client):
        for _ in range(50):
            stream = await client.open_stream(server.host.peer_id, [ECHO])
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert connection(client).streams == connection(server.host).streams == 0


async def test_a_thousand_streams_at_once_are_all_served() -> None:
    answers = 0

    async def one() -> None:
        nonlocal answers
        stream = await client.open_stream(server.host.peer_id, [ECHO])
        await stream.send_all(b"x")
        answer = await stream.receive_some()
        answers += answer == b"x"
        await stream.aclose()

    async with connected() as (server, client), trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(one)
    assert answers == 1000


async def test_a_lazy_stream_whose_window_is_full_goes_on_at_its_first_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The answer's read takes all that is here.
    monkeypatch.setattr("lattica.net.stream.READ_BYTES", 2 * WINDOW)
    async with connected() as (server, client):
        stream = await client.open_stream(server.host.peer_id, [HOLD])
        theirs = await server.held()
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                await theirs.send_all(bytes(2 * WINDOW))
                await theirs.send_eof()

            nursery.start_soon(flood)
            await trio.testing.wait_all_tasks_blocked(0.05)
            size = len(await stream.receive_some(1))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert connection(client).mux.output_bytes == 0  # the credit has left
            while data := await stream.receive_some():
                size += len(data)
        assert size == 2 * WINDOW


async def test_last_words_on_a_new_stream_are_heard_though_nobody_hears_the_answer() -> None:
    async with connected() as (server, client):
        stream = await client.open_stream(server.host.peer_id, [HOLD])
        await stream.send_all(b"last words")  # leaves with the proposal, and the connection ends behind it
        await connection(client).close()
        assert await (await server.held()).receive_some() == b"last words"


# Sending and receiving


async def test_parts_are_queued_together_or_not_at_all() -> None:
    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        assert ours.send_nowait([b"a", memoryview(b"b"), bytearray(b"c")])
        assert not ours.send_nowait([bytes(WINDOW - 2), b"xx"])
        assert await theirs.receive_some() == b"abc"
        await ours.send_all(b"d")
        assert await theirs.receive_some() == b"d"


async def test_a_sender_that_was_refused_goes_on_when_the_reader_has_read() -> None:
    size = 5 * WINDOW + 17
    got = bytearray()

    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)

        async def send() -> None:
            await ours.send_all(memoryview(bytes(size)))
            await ours.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.02)
            while data := await theirs.receive_some(10_000):
                assert len(data) <= 10_000
                got += data
        assert len(got) == size
        with pytest.raises(LocalProtocolError):
            ours.send_nowait([b"after the end"])


async def test_receive_into_fills_a_buffer_and_says_how_far() -> None:
    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        await ours.send_all(b"abcdef")
        await ours.send_eof()
        buffer = bytearray(4)
        assert await theirs.receive_into(memoryview(buffer)) == 4
        assert buffer == b"abcd"
        assert await theirs.receive_into(memoryview(buffer)) == 2
        assert await theirs.receive_into(memoryview(buffer)) == 0


async def test_receive_nowait_tells_nothing_from_the_end() -> None:
    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        assert theirs.receive_nowait() is None
        await ours.send_all(b"x")
        await ours.send_eof()
        assert await theirs.receive_some() == b"x"
        assert await theirs.receive_some() == b""
        assert theirs.receive_nowait() == b""


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        for number in range(200):
            with trio.move_on_after(0.0001 * (number % 5)):
                await theirs.receive_some()
                pytest.fail("nothing was sent yet")
        await ours.send_all(b"all of it")
        assert await theirs.receive_some() == b"all of it"


async def test_two_readers_of_one_stream_are_a_mistake() -> None:
    async with connected() as (server, client):
        ours, _ = await held_pair(server, client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await ours.receive_some()
            nursery.cancel_scope.cancel()


async def test_what_tasks_send_in_one_pass_leaves_in_one_call() -> None:
    """Each call would be a record of its own: with 100 of them 1,800 bytes more than one record takes."""
    async with connected() as (server, client):
        streams = [(await held_pair(server, client))[0] for _ in range(100)]
        await trio.testing.wait_all_tasks_blocked(0.02)
        before = client.traffic.sent_bytes
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(stream.send_all, b"x" * 20)
        await trio.testing.wait_all_tasks_blocked(0.02)
        frames = 100 * (12 + 20)
        assert client.traffic.sent_bytes - before < frames + 100  # a few records, not a hundred


async def test_the_first_answers_to_what_came_in_one_read_leave_before_the_last_is_handed_out() -> None:
    """Or else two ends with many calls in flight take turns instead of working at once."""
    sent_before: list[int] = []

    async def answer(stream: MuxedStream) -> None:
        await stream.receive_some()
        sent_before.append(server.host.traffic.sent_bytes)
        await stream.send_all(b"y")

    async with connected() as (server, client):
        pairs = [await held_pair(server, client) for _ in range(64)]
        async with trio.open_nursery() as nursery:
            for _, theirs in pairs:
                nursery.start_soon(answer, theirs)
            await trio.testing.wait_all_tasks_blocked(0.02)
            for ours, _ in pairs:
                nursery.start_soon(ours.send_all, b"x")
    assert len(sent_before) == 64
    assert 2 <= len(set(sent_before)) <= 8, (
        sent_before
    )  # shares of 32, or what a read cut in two makes of them


async def test_a_small_call_waits_for_few_frames_of_a_bulk_stream_beside_it() -> None:
    """In bytes and not in seconds: what of the bulk stream arrives between a call and its answer."""
    passed = []

    async with connected() as (server, client):

        async def flood() -> None:
            bulk = await client.open_stream(server.host.peer_id, ["/lattica/sink"])
            while True:
                await bulk.send_all(bytes(1 << 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            echo = await client.open_stream(server.host.peer_id, [ECHO])
            while server.received < 8 << 20:  # noqa: ASYNC110  # until its window has grown as far as it will
                await trio.sleep(0.001)
            for _ in range(50):
                before = server.received
                await echo.send_all(b"x")
                await echo.receive_some()
                passed.append(server.received - before)
            nursery.cancel_scope.cancel()
    assert statistics.median(passed) < 4 << 20


# Breaking


async def test_a_reset_is_told_at_once_whatever_is_unread() -> None:
    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        told: list[str] = []
        broke = trio.Event()
        theirs.on_break(lambda: (told.append("theirs"), broke.set())[1])
        ours.on_break(lambda: told.append("ours"))
        await ours.send_all(b"unread")
        await trio.testing.wait_all_tasks_blocked(0.01)
        ours.reset()
        await broke.wait()
        with pytest.raises(StreamError, match="reset"):
            await theirs.receive_some()
        late: list[int] = []
        theirs.on_break(lambda: late.append(1))
        assert (told, late) == (["theirs"], [1])


async def test_a_lost_connection_breaks_its_streams_and_an_end_does_not() -> None:
    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        told: list[str] = []
        theirs.on_break(lambda: told.append("lost"))
        await ours.send_eof()
        assert await theirs.receive_some() == b""
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert told == []
        connection(client).abort("cut by the test")
        await connection(server.host).ended.wait()
        assert told == ["lost"]


async def test_a_peer_that_takes_no_more_streams_breaks_those_it_never_took() -> None:
    """As rust-yamux at its 512th stream: GO_AWAY with code 1, and the older ones go on."""
    async with connected() as (server, client):
        echo = await client.open_stream(server.host.peer_id, [ECHO])
        await echo.send_all(b"first")
        assert await echo.receive_some() == b"first"
        late = connection(client).open_now()
        there = connection(server.host)
        there.mux.go_away(1)
        there.flush_soon()
        with pytest.raises(StreamError, match="takes no more streams"):
            await late.receive_some()
        await echo.send_all(b"still")
        assert await echo.receive_some() == b"still"
        with pytest.raises(StreamError):
            connection(client).open_now()


async def test_a_callback_that_raises_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a bug in a callback")

    async with connected() as (server, client):
        ours, theirs = await held_pair(server, client)
        theirs.on_break(fail)
        ours.reset()
        echo = await client.open_stream(server.host.peer_id, [ECHO])
        await echo.send_all(b"still")
        assert await echo.receive_some() == b"still"
    assert "a bug in a callback" in caplog.text


async def test_200_cancelled_writes_leave_the_connection_whole() -> None:
    async with connected() as (server, client):
        for number in range(200):
            stream = await client.open_stream(
                server.host.peer_id, ["/lattica/sink" if number % 2 else "/lattica/deaf"]
            )
            with trio.move_on_after(0.001):
                await stream.send_all(bytes(4 << 20))
            stream.reset()
        echo = await client.open_stream(server.host.peer_id, [ECHO])
        await echo.send_all(b"whole")
        assert await echo.receive_some() == b"whole"
        assert len(client.connections()) == 1


async def test_a_reader_that_waits_for_enough_is_woken_by_it_by_the_end_and_by_a_reset() -> None:
    async with connected() as (server, client):
        for last_word in ("enough", "end", "reset"):
            stream = await client.open_stream(server.host.peer_id, [HOLD])
            await stream.send_all(b"x")
            far = await server.held()
            assert await far.receive_some() == b"x"
            buffer, got = memoryview(bytearray(50_000)), []

            async def read(far: Stream, buffer: memoryview, got: list[object]) -> None:
                try:
                    got.append(await far.receive_into(buffer, len(buffer)))
                except StreamError as error:
                    got.append(error)

            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, far, buffer, got)
                    await stream.send_all(bytes(10_000))
                    while far._mux.available(far.stream_id) < 10_000:  # noqa: ASYNC110  # it tells nobody, as it should
                        await trio.sleep(0.001)
                    assert got == []
                    if last_word == "enough":
                        await stream.send_all(bytes(40_000))
                    elif last_word == "end":
                        await stream.send_eof()
                    else:
                        stream.reset()
            expected = {"enough": "50000", "end": "10000", "reset": "the other side reset the stream"}
            assert [str(what) for what in got] == [expected[last_word]]
