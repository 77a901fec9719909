"""libp2p's own host, Swarm and protocol code on our transport, against a host of ours."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import PingService
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.peer.peerstore import PeerStore
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.net.faces import TransportFace
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity
from lattica.net.mux import WindowBudget
from lattica.net.transport import Transport

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ECHO = "/lattica/echo"
SIZE = 1 << 20


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def theirs_echo(stream: INetStream) -> None:
    try:
        while True:
            await stream.write(await stream.read(65_536))
    except StreamEOF:
        await stream.close()


@asynccontextmanager
async def both() -> AsyncIterator[tuple[MeshHost, BasicHost]]:
    identity = Identity.generate()
    store = PeerStore()
    own = ID(identity.peer_id.multihash)
    store.add_key_pair(own, create_new_key_pair(identity.private_bytes))
    network = Swarm(
        own,
        store,
        TransportUpgrader({}, {}),  # nothing to upgrade
        transports=[TransportFace(Transport(identity, windows=WindowBudget(1 << 20)))],
        connection_config=ConnectionConfig(min_connections=0, low_watermark=0),
    )
    host = BasicHost(network)
    host.set_stream_handler(TProtocol(ECHO), theirs_echo)
    async with open_host(identity=Identity.generate(), listen=[LOOPBACK], agent="ours/1") as ours:
        ours.serve(ECHO, echo)
        async with background_trio_service(network):
            await network.listen(Multiaddr(LOOPBACK))
            try:
                with trio.fail_after(20):
                    yield ours, host
            finally:
                with trio.CancelScope(shield=True):
                    await host.close()


def id_of(host: BasicHost) -> PeerId:
    return PeerId.parse(str(host.get_id()))


async def test_libp2p_listens_on_our_transport_and_answers() -> None:
    async with both() as (ours, theirs):
        await ours.connect(str(theirs.get_addrs()[0]))
        stream = await ours.open_stream(id_of(theirs), ["/not/there", ECHO])
        got = bytearray()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(bytes(SIZE))
                await stream.send_eof()

            nursery.start_soon(send)
            while data := await stream.receive_some():
                got += data
        assert bytes(got) == bytes(SIZE)


async def test_libp2p_dials_by_our_transport_and_asks() -> None:
    async with both() as (ours, theirs):
        info = info_from_p2p_addr(Multiaddr(ours.addresses[0]))
        await theirs.connect(info)
        assert [peer.peer_id for peer in ours.peers()] == [id_of(theirs)]
        stream = await theirs.new_stream(info.peer_id, [TProtocol(ECHO)])
        got = bytearray()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.write(bytes(SIZE))
                await stream.close_write()  # type: ignore[attr-defined]  # NetStream has it

            nursery.start_soon(send)
            with contextlib.suppress(StreamEOF):
                while True:
                    got += await stream.read(65_536)
        assert bytes(got) == bytes(SIZE)
        assert len(await PingService(theirs).ping(info.peer_id, ping_amt=3)) == 3


async def test_a_dial_that_fails_is_libp2ps_own_error() -> None:
    async with both() as (ours, _):
        face = TransportFace(Transport(Identity.generate(), windows=WindowBudget(0)))
        stranger = Identity.generate().peer_id
        with pytest.raises(Exception, match=f"expected peer {stranger}") as caught:
            await face.dial(Multiaddr(f"{ours.addresses[0].partition('/p2p/')[0]}/p2p/{stranger}"))
        assert type(caught.value).__module__.startswith("libp2p.")


async def test_an_inbound_connection_that_ends_is_forgotten() -> None:
    async with both() as (ours, theirs):
        for _ in range(5):
            await ours.connect(str(theirs.get_addrs()[0]))
            await ours.ping(id_of(theirs))
            await ours.disconnect(id_of(theirs))
        while theirs.get_connected_peers():  # noqa: ASYNC110  # nothing here could set an event
            await trio.sleep(0.001)
