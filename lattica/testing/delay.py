"""A TCP proxy that delays every byte by a fixed time and limits nothing else."""

from __future__ import annotations

import math
import socket
import struct
from collections import deque
from typing import Final, Self

import trio

from lattica.protocols import MIB

_READ_BYTES: Final = 256 * 1024
_LINGER_NONE: Final = struct.pack("ii", 1, 0)  # closing sends a reset instead of an end


class DelayProxy:
    """Real sockets on 127.0.0.1 with a slow line between: `async with DelayProxy(host, port, 0.05) as proxy`.

    Whoever connects to `proxy.port` is connected to the target. Each byte arrives `one_way_seconds` after it
    was sent, in either direction and in order, to about a millisecond (the event loop's clock). Many may be
    on their way at once, so that throughput isn't limited by the delay but only by `max_in_flight_bytes` a
    direction. An end of sending and a reset are passed on, delayed likewise; while the target is down,
    connections are closed at once.

    Args:
        one_way_seconds: may be changed while it runs; bytes on their way keep their time.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        one_way_seconds: float,
        *,
        listen_host: str = "127.0.0.1",
        max_in_flight_bytes: int = 64 * MIB,
    ) -> None:
        self.one_way_seconds = one_way_seconds
        self.port = 0
        self._target = (target_host, target_port)
        self._listen_host = listen_host
        self._max_in_flight_bytes = max_in_flight_bytes
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        listener = (await trio.open_tcp_listeners(0, host=self._listen_host))[0]
        self.port = listener.socket.getsockname()[1]
        self._nursery = await self._manager.__aenter__()
        self._nursery.start_soon(trio.serve_listeners, self._serve, [listener])
        return self

    async def __aexit__(self, *raised: object) -> None:
        # The nursery isn't told what was raised, so that it goes on as it is and not inside of a group.
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            await self._manager.__aexit__(None, None, None)

    async def _serve(self, client: trio.SocketStream) -> None:
        try:
            target = await trio.open_tcp_stream(*self._target)
        except OSError:
            _reset(client)
            return
        async with client, target:
            for stream in (client, target):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with trio.open_nursery() as nursery:
                for source, sink in ((client, target), (target, client)):
                    line = _Line(self, source, sink, self._max_in_flight_bytes)
                    nursery.start_soon(line.read)
                    nursery.start_soon(line.write)


class _Line:
    """One direction of one connection: chunks wait in a queue until their time has come."""

    def __init__(
        self, proxy: DelayProxy, source: trio.SocketStream, sink: trio.SocketStream, max_bytes: int
    ) -> None:
        self._proxy = proxy
        self._source = source
        self._sink = sink
        self._queue: deque[tuple[float, bytes | None]] = deque()  # when due, what; None: a reset
        self._room = max_bytes
        self._changed = trio.lowlevel.ParkingLot()

    async def read(self) -> None:
        last = -math.inf
        while True:
            data: bytes | None
            try:
                data = await self._source.receive_some(_READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = None
            last = max(last, trio.current_time() + self._proxy.one_way_seconds)
            self._queue.append((last, data))
            self._changed.unpark_all()
            if not data:
                return
            self._room -= len(data)
            while self._room <= 0:
                await self._changed.park()

    async def write(self) -> None:
        while True:
            while not self._queue:
                await self._changed.park()
            due, data = self._queue.popleft()
            await trio.sleep_until(due)
            try:
                if data is None:
                    _reset(self._sink)
                    return
                if not data:
                    await self._sink.send_eof()
                    return
                await self._sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                _reset(self._source)
                return
            self._room += len(data)
            self._changed.unpark_all()


def _reset(stream: trio.SocketStream) -> None:
    """Close a socket with a reset; nothing happens when it is closed already."""
    if stream.socket.fileno() != -1:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        stream.socket.close()
