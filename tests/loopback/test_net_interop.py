"""Our host against stock py-libp2p, with its own TCP, Noise and Yamux, in both directions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity

ECHO = "/lattica/echo"
SIZE = 1 << 20


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def stock_echo(stream: INetStream) -> None:
    try:
        while True:
            await stream.write(await stream.read(65_536))
    except StreamEOF:
        await stream.close()


@asynccontextmanager
async def both() -> AsyncIterator[tuple[MeshHost, IHost]]:
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    stock: Any = new_host(
        key_pair=create_new_key_pair(bytes(range(32))),
        listen_addrs=listen,
        connection_config=ConnectionConfig(min_connections=0, low_watermark=0),
    )
    async with (
        open_host(identity=Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], agent="ours/1") as ours,
        stock.run(listen),
    ):
        ours.serve(ECHO, echo)
        stock.set_stream_handler(TProtocol(ECHO), stock_echo)
        try:
            with trio.fail_after(30):
                yield ours, stock
        finally:
            with trio.CancelScope(shield=True):
                await stock.close()


def peer_id(stock: IHost) -> PeerId:
    return PeerId.parse(str(stock.get_id()))


async def connect(ours: MeshHost, stock: IHost, *, we_dial: bool) -> None:
    if we_dial:
        await ours.connect(str(stock.get_addrs()[0]))
    else:
        await stock.connect(info_from_p2p_addr(Multiaddr(ours.addresses[0])))
    assert [peer.peer_id for peer in ours.peers()] == [peer_id(stock)]
    while stock_id(ours) not in stock.get_connected_peers():  # noqa: ASYNC110  # nothing here could set an event
        await trio.sleep(0.001)


@pytest.mark.parametrize("we_dial", [True, False], ids=["we dial", "stock dials"])
async def test_we_open_an_echo_on_stock(we_dial: bool) -> None:
    async with both() as (ours, stock):
        await connect(ours, stock, we_dial=we_dial)
        stream = await ours.open_stream(peer_id(stock), ["/not/there", ECHO])
        got = bytearray()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(bytes(SIZE))
                await stream.send_eof()

            nursery.start_soon(send)
            while data := await stream.receive_some():
                got += data
        assert bytes(got) == bytes(SIZE)


@pytest.mark.parametrize("we_dial", [True, False], ids=["we dial", "stock dials"])
async def test_stock_opens_an_echo_on_us(we_dial: bool) -> None:
    async with both() as (ours, stock):
        await connect(ours, stock, we_dial=we_dial)
        stream = await stock.new_stream(stock_id(ours), [TProtocol(ECHO)])
        got = bytearray()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for _ in range(SIZE // 65_536):
                    await stream.write(bytes(65_536))
                await stream.close_write()  # type: ignore[attr-defined]  # NetStream has it

            nursery.start_soon(send)
            with contextlib.suppress(StreamEOF):
                while True:
                    got += await stream.read(65_536)
        assert bytes(got) == bytes(SIZE)


def stock_id(ours: MeshHost) -> Any:
    return info_from_p2p_addr(Multiaddr(ours.addresses[0])).peer_id


@pytest.mark.parametrize("we_dial", [True, False], ids=["we dial", "stock dials"])
async def test_both_ping_and_identify_each_other(we_dial: bool) -> None:
    async with both() as (ours, stock):
        await connect(ours, stock, we_dial=we_dial)
        assert 0 < await ours.ping(peer_id(stock)) < 1
        assert len(await PingService(stock).ping(stock_id(ours), ping_amt=3)) == 3
        while not ours.peers()[0].agent:  # noqa: ASYNC110  # nothing here could set an event
            await trio.sleep(0.001)
        assert ECHO in ours.peers()[0].protocols
        assert "libp2p" in ours.peers()[0].agent
        while ECHO not in known(stock, ours):  # noqa: ASYNC110
            await trio.sleep(0.001)
        addresses = [str(address) for address in stock.get_peerstore().addrs(stock_id(ours))]
        assert addresses == [ours.addresses[0].partition("/p2p/")[0]]


def known(stock: IHost, ours: MeshHost) -> list[str]:
    return stock.get_peerstore().get_protocols(stock_id(ours))


async def test_a_stock_peer_that_closes_is_noticed() -> None:
    async with both() as (ours, stock):
        left = trio.Event()
        ours.watch(lambda peer, connected: None if connected else left.set())
        await connect(ours, stock, we_dial=False)
        await stock.disconnect(stock_id(ours))
        await left.wait()
        assert ours.peers() == []
