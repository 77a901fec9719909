"""Meeting go-, rust- and js-libp2p: dialling, identities, identify, ping, and parting."""

from __future__ import annotations

import socket

import pytest
import trio
from interop_peers import (
    ECHO,
    PeerError,
    RunPeer,
    connected,
    pattern,
    read_all,
    run_ours,
    send_and_end,
    until,
)

from lattica.errors import DialError, StreamError
from lattica.net.identity import Identity

pytestmark = [pytest.mark.interop, pytest.mark.slow]

both_dial = pytest.mark.parametrize("we_dial", [True, False], ids=["we-dial", "they-dial"])
NEW = "/interop/new/1.0.0"


@both_dial
async def test_identify_tells_each_side_who_the_other_is(
    run_other: RunPeer, language: str, we_dial: bool
) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        heard = await pair.other.event("identified")
        assert heard["peer"] == str(pair.ours.peer_id)
        assert heard["agent"] == "ours/1"
        assert set(pair.ours.protocols) == set(heard["protocols"])
        told = [address.partition("/p2p/")[0] for address in heard["addresses"]]
        assert told == pair.ours.advertised

        await until(lambda: pair.ours.peers()[0].agent)
        (peer,) = pair.ours.peers()
        assert peer.peer_id == pair.other.peer_id
        assert peer.agent == f"{language}-libp2p interop"
        assert {ECHO, "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(peer.protocols)
        where = pair.other.address.partition("/p2p/")[0]
        assert where in peer.addresses
        assert peer.inbound is not we_dial


@both_dial
async def test_the_other_side_observes_the_address_that_we_dial_from(
    run_other: RunPeer, we_dial: bool
) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        connection = await pair.other.event("connected")
        heard = await pair.other.event("identified")
        assert connection["outbound"] is not we_dial
        assert heard["observed"].startswith("/ip4/127.0.0.1/tcp/")
        if (
            not we_dial
        ):  # from our end their address is the one they dialled from, which they can't know otherwise
            assert heard["observed"].partition("/p2p/")[0] == str(pair.ours.connections()[0].remote)


@both_dial
async def test_a_new_protocol_of_ours_is_pushed_to_them(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        first = await pair.other.event("identified")
        assert NEW not in first["protocols"]
        await until(lambda: pair.ours.peers()[0].protocols)  # a push is for peers that speak it

        async def ignore(stream: object) -> None: ...

        pair.ours.serve(NEW, ignore)
        await pair.other.event("identified", where=lambda event: NEW in event["protocols"])
        assert NEW in (await pair.other.do("protocols", peer=pair.ours.peer_id))["protocols"]


@both_dial
async def test_a_new_protocol_of_theirs_is_pushed_to_us(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        await pair.other.event("identified")
        await until(lambda: pair.ours.peers()[0].protocols)
        assert NEW not in pair.ours.peers()[0].protocols
        await pair.other.do("serve", protocol=NEW)
        await until(lambda: NEW in pair.ours.peers()[0].protocols)
        stream = await pair.ours.open_stream(pair.other.peer_id, [NEW])
        await stream.send_all(b"new")
        await stream.send_eof()
        assert await read_all(stream) == b"new"


@both_dial
async def test_both_ping_each_other(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        for _ in range(3):
            assert 0 < await pair.ours.ping(pair.other.peer_id) < 10
            rtt = (await pair.other.do("ping", peer=pair.ours.peer_id))["seconds"]
            assert 0 <= rtt < 10  # js-libp2p counts whole milliseconds


@both_dial
async def test_all_of_it_works_over_ipv6(run_other: RunPeer, we_dial: bool) -> None:
    require_ipv6()
    async with connected(run_other, we_dial=we_dial, ip="/ip6/::1") as pair:
        heard = await pair.other.event("identified")
        assert heard["observed"].startswith("/ip6/::1/tcp/")
        assert heard["addresses"][0].startswith("/ip6/::1/tcp/")
        data = pattern(1 << 20)
        stream = await pair.ours.open_stream(pair.other.peer_id, [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, stream, data)
            assert await read_all(stream) == data
        result = await pair.other.do("echo", peer=pair.ours.peer_id, bytes=1 << 20)
        assert result["received"] == result["sent"]


@both_dial
async def test_we_hang_up_and_they_notice(run_other: RunPeer, language: str, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        await pair.other.event("connected")
        _, number = await pair.open_held(we_open=we_dial)
        await pair.ours.disconnect(pair.other.peer_id)
        assert pair.ours.peers() == []
        assert (await pair.other.event("disconnected"))["peer"] == str(pair.ours.peer_id)
        if language == "go":
            with pytest.raises(PeerError, match="closed"):
                await pair.other.do("read", stream=number, bytes=1)
        else:  # rust- and js-libp2p read a lost connection as an end; only a write tells
            assert await pair.other.do("read", stream=number, bytes=1) == {"text": "", "ended": True}
            with pytest.raises(PeerError):
                await pair.other.do("write", stream=number, text="into nothing")


@both_dial
async def test_they_hang_up_and_we_notice(run_other: RunPeer, language: str, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        stream, _ = await pair.open_held(we_open=we_dial)
        left = trio.Event()
        pair.ours.watch(lambda peer, connected: None if connected else left.set())
        await pair.other.do("hang up", peer=pair.ours.peer_id)
        await left.wait()
        assert pair.ours.peers() == []
        if language == "js":  # it ends its streams before it hangs up
            assert await stream.receive_some() == b""
        else:
            with pytest.raises(StreamError, match="lost"):
                await stream.receive_some()
        with pytest.raises(StreamError, match="lost"):
            await stream.send_all(b"into nothing")


@both_dial
async def test_a_killed_peer_breaks_streams_with_an_error(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        stream, number = await pair.open_held(we_open=we_dial)
        await pair.other.do("write", stream=number, text="half of it")
        pair.other.kill()
        with pytest.raises(StreamError):
            while await stream.receive_some():
                pass
            pytest.fail("a lost connection looked like a clean end")


@both_dial
async def test_they_meet_again_after_hanging_up(run_other: RunPeer, we_dial: bool) -> None:
    async with connected(run_other, we_dial=we_dial) as pair:
        for _ in range(3):
            await pair.other.event("connected")
            await pair.ours.disconnect(pair.other.peer_id)
            await pair.other.event("disconnected")
            if we_dial:
                await pair.ours.connect(pair.other.address)
            else:
                await pair.other.do("dial", address=pair.ours.addresses[0])
        assert await pair.ours.ping(pair.other.peer_id) > 0


async def test_we_refuse_somebody_else_at_their_address(run_other: RunPeer) -> None:
    somebody = Identity.generate().peer_id
    async with run_ours() as (ours, _), run_other() as other:
        address = other.address.replace(str(other.peer_id), str(somebody))
        with pytest.raises(DialError) as failed:
            await ours.connect(address)
        assert str(somebody) in str(failed.value)
        assert str(other.peer_id) in str(failed.value)
        assert ours.peers() == []
        await ours.connect(other.address)  # and the address is not spoilt for who is really there


async def test_they_refuse_somebody_else_at_our_address(run_other: RunPeer) -> None:
    somebody = Identity.generate().peer_id
    async with run_ours() as (ours, _), run_other() as other:
        address = ours.addresses[0].replace(str(ours.peer_id), str(somebody))
        with pytest.raises(PeerError) as failed:
            await other.do("dial", address=address)
        assert str(ours.peer_id) in str(failed.value)  # who is really there
        await other.do("dial", address=ours.addresses[0])
        await until(ours.peers)
        assert [peer.peer_id for peer in ours.peers()] == [other.peer_id]


def require_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
