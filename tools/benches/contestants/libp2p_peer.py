"""Stock py-libp2p: TCP, Noise and Yamux as it ships, none of our fixes. Raw streams: it has no calls."""

from __future__ import annotations

import logging
import sys

import _lines as lines
import _trio_jobs as jobs
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import INetStream
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from multiaddr import Multiaddr

ECHO = TProtocol("/bench/echo/1.0.0")
BULK = TProtocol("/bench/bulk/1.0.0")
READ_BYTES = 65536


class Stream:
    """A libp2p stream with the names of trio's."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream
        self._ended = False

    async def send_all(self, data: bytes) -> None:
        await self._stream.write(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return await self._stream.read(max_bytes or READ_BYTES)
        except StreamEOF:
            return b""

    async def send_eof(self) -> None:
        if not self._ended:
            self._ended = True
            await self._stream.close()

    async def aclose(self) -> None:
        await self.send_eof()


async def echo(stream: INetStream) -> None:
    both = Stream(stream)
    await jobs.echo_stream(both)
    await both.aclose()


async def bulk(stream: INetStream) -> None:
    await jobs.count_bytes(Stream(stream))


async def serve(host: str) -> None:
    peer = new_host(key_pair=create_new_key_pair())
    peer.set_stream_handler(ECHO, echo)
    peer.set_stream_handler(BULK, bulk)
    async with peer.run(listen_addrs=[Multiaddr(f"/ip4/{host}/tcp/0")]):
        lines.serve_state()
        lines.say({"address": str(peer.get_addrs()[0])})
        await trio.sleep_forever()


class Client:
    def __init__(self, host: object, server: PeerInfo) -> None:
        self._host, self._server = host, server

    async def _stream(self, protocol: TProtocol) -> Stream:
        return Stream(await self._host.new_stream(self._server.peer_id, [protocol]))

    async def bulk(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        await jobs.send_bulk(await self._stream(BULK), tally)
        return tally.result()

    async def echo(self, job: lines.Job) -> lines.Result:
        return await jobs.echo_on([await self._stream(ECHO) for _ in range(job["callers"])], job)

    async def connect(self, job: lines.Job) -> lines.Result:
        await self._host.disconnect(self._server.peer_id)
        tally = lines.Tally(0)
        for _ in range(job["count"]):
            with tally.piece():
                await self._host.connect(self._server)
                stream = await self._stream(ECHO)
                await stream.send_all(b"x")
                await stream.receive_some()
            await stream.aclose()
            await self._host.disconnect(self._server.peer_id)
        await self._host.connect(self._server)
        return tally.result()


async def client(address: str) -> None:
    host = new_host(key_pair=create_new_key_pair())
    async with host.run(listen_addrs=[]):
        server = info_from_p2p_addr(Multiaddr(address))
        await host.connect(server)
        await jobs.work(Client(host, server))


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # it logs expected ends at ERROR
    trio.run({"serve": serve, "client": client}[sys.argv[1]], sys.argv[2])
