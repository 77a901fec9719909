"""The network that other tests stand on: what it promises about time, order, windows, loss and partitions."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import pytest
import trio

from lattica.errors import DialError, LocalProtocolError, StreamError, UnreachableError
from lattica.ids import PeerId
from lattica.net.api import Host, Stream
from lattica.net.identity import Identity
from lattica.testing import MemoryHost, MemoryNetwork

ECHO = "/lattica/echo"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def connected(network: MemoryNetwork) -> tuple[MemoryHost, MemoryHost]:
    alice, bob = network.host("alice"), network.host("bob")
    bob.serve(ECHO, echo)
    await alice.connect(bob.addresses[0])
    return alice, bob


async def exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        assert piece
        data += piece
    return data


async def test_a_round_trip_takes_twice_the_latency(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.05) as network:
        alice, bob = await connected(network)
        stream = await alice.open_stream(bob.peer_id, [ECHO])
        started = trio.current_time()
        await stream.send_all(b"x" * 1000)
        assert await exactly(stream, 1000) == b"x" * 1000
        assert trio.current_time() - started == pytest.approx(0.1)
        network.set_latency(alice, bob, 0.2)
        assert await alice.ping(bob.peer_id) == pytest.approx(0.4)
        assert alice.peers()[0].rtt == pytest.approx(0.4)


async def test_many_bytes_share_a_latency_up_to_the_window(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=1, window_bytes=100_000) as network:
        alice, bob = await connected(network)
        stream = await alice.open_stream(bob.peer_id, [ECHO])
        started = trio.current_time()
        await stream.send_all(bytes(100_000))
        assert trio.current_time() == started  # the window takes it all at once
        await stream.send_all(b"!")
        assert trio.current_time() - started == pytest.approx(2)  # the reader's credit came back
        await exactly(stream, 100_001)
        assert trio.current_time() - started == pytest.approx(4)


async def test_a_reader_that_stops_stops_its_writer(autojump_clock: object) -> None:
    async with MemoryNetwork(window_bytes=1000) as network:
        alice, bob = await connected(network)

        async def stuck(stream: Stream) -> None:
            await trio.sleep_forever()

        bob.serve("/stuck", stuck)
        stream = await alice.open_stream(bob.peer_id, ["/stuck"])
        await stream.send_all(bytes(1000))
        with trio.move_on_after(3600) as scope:
            await stream.send_all(b"!")
        assert scope.cancelled_caught


async def test_the_same_seed_gives_the_same_network(autojump_clock: object) -> None:
    times: list[list[float]] = []
    for seed in (1, 1, 2):
        async with MemoryNetwork(seed, latency=0.01, loss=0.3) as network:
            alice, bob = await connected(network)
            times.append(
                [round(await alice.ping(bob.peer_id), 6) for _ in range(20)]
                + [float(bob.peer_id.multihash[-1])]
            )
    assert times[0] == times[1] != times[2]


async def test_loss_costs_time_and_never_bytes_or_order(autojump_clock: object) -> None:
    async with MemoryNetwork(seed=3, latency=0.01, loss=0.5) as network:
        alice, bob = await connected(network)
        stream = await alice.open_stream(bob.peer_id, [ECHO])
        started, sent = trio.current_time(), b"".join(i.to_bytes(2, "big") for i in range(2000))
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for at in range(0, len(sent), 100):
                    await stream.send_all(sent[at : at + 100])
                await stream.send_eof()

            nursery.start_soon(send)
            assert await exactly(stream, len(sent)) == sent
            assert await stream.receive_some() == b""
        assert trio.current_time() - started >= 0.2


async def test_a_partition_holds_bytes_back_until_it_heals(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1, break_after=60) as network:
        alice, bob = await connected(network)
        stream = await alice.open_stream(bob.peer_id, [ECHO])
        await stream.send_all(b"before")
        network.partition([alice], [bob])
        with trio.move_on_after(30) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        network.heal()
        healed = trio.current_time()
        assert await exactly(stream, 6) == b"before"
        assert trio.current_time() - healed == pytest.approx(0.2)
        assert len(alice.peers()) == len(bob.peers()) == 1


async def test_a_long_partition_breaks_connections_and_stops_dials(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1, break_after=15, dial_timeout=10) as network:
        alice, bob = await connected(network)
        events: list[tuple[str, PeerId, bool]] = []
        alice.watch(lambda peer, up: events.append(("alice", peer, up)))
        bob.watch(lambda peer, up: events.append(("bob", peer, up)))
        stream = await alice.open_stream(bob.peer_id, [ECHO])
        started = trio.current_time()
        network.partition(["alice"], ["bob", "carol"])
        with pytest.raises(StreamError, match="timed out"):
            await stream.receive_some()
        assert trio.current_time() - started == pytest.approx(15)
        assert sorted(events) == [("alice", bob.peer_id, False), ("bob", alice.peer_id, False)]
        assert alice.peers() == bob.peers() == []
        started = trio.current_time()
        with pytest.raises(DialError) as caught:
            await alice.open_stream(bob.peer_id, [ECHO])
        assert trio.current_time() - started == pytest.approx(10)
        assert caught.value.attempts == ((bob.addresses[0], "timed out"),)
        await bob.connect(network.host("carol").addresses[0])  # the same side
        network.heal()
        await alice.open_stream(bob.peer_id, [ECHO])
        assert [up for name, _, up in events if name == "alice"] == [False, True]


async def test_an_ended_stream_is_read_to_its_end_and_a_reset_one_is_not(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1) as network:
        alice, bob = await connected(network)
        seen: list[object] = []

        async def read(stream: Stream) -> None:
            await trio.sleep(1)
            try:
                seen.append(await stream.receive_some())
                seen.append(await stream.receive_some())
            except StreamError:
                seen.append("reset")

        bob.serve("/read", read)
        for end in ("close", "reset"):
            stream = await alice.open_stream(bob.peer_id, ["/read"])
            await stream.send_all(b"last words")
            if end == "close":
                await stream.aclose()
            else:
                stream.reset()
                stream.reset()
            with pytest.raises(StreamError):
                await stream.send_all(b"more")
            await trio.sleep(2)
        assert seen == [b"last words", b"", "reset"]


async def test_what_nobody_reads_still_takes_its_time(autojump_clock: object) -> None:
    async with MemoryNetwork(latency=0.1, window_bytes=1000) as network:
        alice, bob = await connected(network)

        async def leave(stream: Stream) -> None:
            await stream.aclose()

        bob.serve("/leave", leave)
        stream = await alice.open_stream(bob.peer_id, ["/leave"])
        started = trio.current_time()
        await stream.send_all(bytes(10_000))
        assert trio.current_time() - started == pytest.approx(9 * 0.2)


async def test_a_handler_that_raises_resets_its_stream_and_nothing_else(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with MemoryNetwork() as network:
        alice, bob = await connected(network)

        async def fail(stream: Stream) -> None:
            raise ValueError("in a handler")

        bob.serve("/fail", fail)
        stream = await alice.open_stream(bob.peer_id, ["/fail"])
        with pytest.raises(StreamError):
            await stream.receive_some()
        assert "in a handler" in caplog.text
        good = await alice.open_stream(bob.peer_id, ["/nobody", ECHO])
        assert good.protocol == ECHO
        await good.send_all(b"fine")
        assert await exactly(good, 4) == b"fine"


variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_context_variables_do_not_cross_the_network(autojump_clock: object) -> None:
    async with MemoryNetwork() as network:
        alice, bob = await connected(network)

        async def tell(stream: Stream) -> None:
            await stream.send_all(variable.get().encode())

        bob.serve("/tell", tell)
        token = variable.set("alice's")
        stream = await alice.open_stream(bob.peer_id, ["/tell"])
        variable.reset(token)
        assert await stream.receive_some() == b"unset"


async def test_what_cannot_be_reached_says_why(autojump_clock: object) -> None:
    async with MemoryNetwork() as network:
        alice, bob = await connected(network)
        carol = network.host("carol")
        with pytest.raises(UnreachableError, match="no address"):
            await alice.open_stream(carol.peer_id, [ECHO])
        with pytest.raises(StreamError, match="speaks none of /nothing"):
            await alice.open_stream(bob.peer_id, ["/nothing"])
        with pytest.raises(DialError, match="nobody listens"):
            await alice.connect(f"/memory/dave/p2p/{carol.peer_id}")
        with pytest.raises(DialError, match=str(bob.peer_id)):
            await alice.connect(f"/memory/bob/p2p/{carol.peer_id}")
        with pytest.raises(DialError, match="our own"):
            await alice.connect(alice.addresses[0])
        with pytest.raises(LocalProtocolError, match="served already"):
            bob.serve(ECHO, echo)
        bob.stop()
        with pytest.raises(DialError, match="does not answer"):
            await alice.open_stream(bob.peer_id, [ECHO])
    with pytest.raises(LocalProtocolError, match="not entered"):
        MemoryNetwork().host("alice")


async def test_the_gate_decides_about_streams_of_the_mesh(autojump_clock: object) -> None:
    async with MemoryNetwork() as network:
        alice, asked = network.host("alice"), []

        def gate(peer: PeerId, protocol: str) -> bool:
            asked.append((peer, protocol))
            return protocol == ECHO

        identity = Identity(bytes(32))
        async with network(identity=identity, gate=gate) as bob:
            typed: Host = bob  # what a node gets is a Host
            assert typed.peer_id == identity.peer_id
            for protocol in (ECHO, "/lattica/secret", "/other"):
                bob.serve(protocol, echo)
            await alice.connect(bob.addresses[0])
            await exactly_echo(await alice.open_stream(bob.peer_id, [ECHO]))
            await exactly_echo(await alice.open_stream(bob.peer_id, ["/other"]))
            refused = await alice.open_stream(bob.peer_id, ["/lattica/secret"])
            with pytest.raises(StreamError):
                await refused.receive_some()
            assert asked == [(alice.peer_id, ECHO), (alice.peer_id, "/lattica/secret")]
        assert alice.peers() == []


async def exactly_echo(stream: Any) -> None:
    await stream.send_all(b"hello")
    assert await exactly(stream, 5) == b"hello"


async def test_what_a_test_raises_comes_out_as_it_is(autojump_clock: object) -> None:
    with pytest.raises(ZeroDivisionError):
        async with MemoryNetwork():
            raise ZeroDivisionError
