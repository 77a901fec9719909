"""What a host says and asks at each connection: who is there, and how far away. It answers the same.

That a connection still lives is found out below, by `MuxedConnection.check`.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

import trio

from lattica.errors import LatticaError, RemoteProtocolError, StreamError
from lattica.net import identify
from lattica.net.api import Stream
from lattica.net.connection import MuxedConnection
from lattica.net.stream import MuxedStream

if TYPE_CHECKING:
    from lattica.net.host import MeshHost

log = logging.getLogger("lattica.net.attend")

PING_PROTOCOL = "/ipfs/ping/1.0.0"
PING_BYTES = 32
PING_IDLE_SECONDS = 60.0  # rust-libp2p pings every 15 s on one stream; a stream idle for longer is forgotten
IDENTIFY_TIMEOUT_SECONDS = 10.0
READ_BYTES = 4096


class Attendant:
    """Serves ping and identify for a host, and uses them on its connections."""

    def __init__(self, host: MeshHost, nursery: trio.Nursery, *, agent: str) -> None:
        self._host = host
        self._nursery = nursery
        self._agent = agent
        self._pushing = False
        host.serve(PING_PROTOCOL, answer_pings)
        host.serve(identify.PROTOCOL, self._describe)
        host.serve(identify.PUSH_PROTOCOL, self._take_push)

    # Ping

    async def ping(self, connection: MuxedConnection) -> float | None:
        """One round trip in seconds; None when the peer doesn't speak ping. Raises StreamError."""
        stream = await connection.open([PING_PROTOCOL])
        if stream is None:
            return None
        try:
            token = secrets.token_bytes(PING_BYTES)
            start = trio.current_time()
            await stream.send_all(token)
            answer = await _read_exactly(stream, PING_BYTES)
            rtt = trio.current_time() - start
            if answer != token:
                raise StreamError(f"{connection.peer} answered a ping with other bytes")
            stream.close()
        finally:
            stream.reset()  # nothing after a close
        self._host.table.pinged(connection.peer, rtt, now=trio.current_time())
        return rtt

    # Identify

    def changed(self) -> None:
        """Our addresses or protocols changed: tell the peers, once for all changes of a moment."""
        if not self._pushing and self._host.connections():
            self._pushing = True
            self._nursery.start_soon(self._push_to_all)

    async def _push_to_all(self) -> None:
        await trio.lowlevel.checkpoint()
        self._pushing = False
        async with trio.open_nursery() as nursery:
            for connection in self._host.connections():
                nursery.start_soon(self._push, connection)

    async def _push(self, connection: MuxedConnection) -> None:
        try:
            with trio.fail_after(IDENTIFY_TIMEOUT_SECONDS):
                stream = await connection.open([identify.PUSH_PROTOCOL])
                if stream is not None:
                    await stream.send_all(self._own(None))
                    await stream.aclose()
        except (LatticaError, trio.TooSlowError) as error:
            log.debug("could not push identify to %s: %s", connection.peer, error)
        except Exception:
            log.exception("pushing identify to %s failed", connection.peer)

    async def ask(self, connection: MuxedConnection) -> None:
        """Learn who is there. Raises nothing but Cancelled."""
        try:
            with trio.fail_after(IDENTIFY_TIMEOUT_SECONDS):
                stream = await connection.open([identify.PROTOCOL])
                if stream is not None:
                    try:
                        await self._learn(stream)
                    finally:
                        stream.reset()
        except (LatticaError, trio.TooSlowError) as error:
            log.info("could not identify %s: %s", connection.peer, error or "no answer in time")
        except Exception:
            log.exception("identifying %s failed", connection.peer)

    async def _describe(self, stream: Stream) -> None:
        assert isinstance(stream, MuxedStream)
        await stream.send_all(self._own(stream.connection))

    async def _take_push(self, stream: Stream) -> None:
        with trio.fail_after(IDENTIFY_TIMEOUT_SECONDS):
            await self._learn(stream)

    async def _learn(self, stream: Stream) -> None:
        self._host.identified(stream.peer, identify.decode(stream.peer, await _read_message(stream)))

    def _own(self, connection: MuxedConnection | None) -> bytes:
        return identify.encode(
            self._host.peer_id,
            agent=self._agent,
            protocols=self._host.protocols,
            addresses=self._host.advertised,
            observed=connection.remote if connection else None,
        )


async def answer_pings(stream: Stream) -> None:
    """Send every 32 bytes back until the other side ends the stream or is idle for too long."""
    while True:
        with trio.move_on_after(PING_IDLE_SECONDS):
            token = await _read_exactly(stream, PING_BYTES, or_nothing=True)
            if token:
                await stream.send_all(token)
                continue
        return


async def _read_exactly(stream: Stream, size: int, *, or_nothing: bool = False) -> bytes:
    """`size` bytes; with `or_nothing` none of them when the stream has ended."""
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            if or_nothing and not data:
                return b""
            raise RemoteProtocolError(f"{stream.peer} ended a stream early", peer=stream.peer)
        data += more
    return data


async def _read_message(stream: Stream) -> bytes:
    data = bytearray()
    while (size := identify.message_size(data)) is None or len(data) < size:
        more = await stream.receive_some(READ_BYTES)
        if not more:
            raise RemoteProtocolError(f"{stream.peer} ended an identify message early", peer=stream.peer)
        data += more
    return bytes(data[:size])
