"""DelayProxy on real sockets: delay, order, throughput, ends."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from lattica.testing import DelayProxy

Handler = Callable[[trio.SocketStream], Awaitable[None]]


async def echo(stream: trio.SocketStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()


@asynccontextmanager
async def behind(
    one_way_seconds: float, handler: Handler = echo, **options: int
) -> AsyncIterator[trio.SocketStream]:
    """A connection through a proxy to a server that runs `handler`."""
    serve = partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        async with (
            DelayProxy("127.0.0.1", port, one_way_seconds, **options) as proxy,
            await trio.open_tcp_stream("127.0.0.1", proxy.port) as stream,
        ):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield stream
        nursery.cancel_scope.cancel()


async def exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some(1 << 20)
        assert piece
        data += piece
    return bytes(data)


async def test_no_byte_arrives_early() -> None:
    async with behind(0.05) as stream:
        for _ in range(3):
            started = time.perf_counter()
            await stream.send_all(b"x")
            await exactly(stream, 1)
            assert time.perf_counter() - started >= 0.1


async def test_order_is_kept_and_one_chunk_does_not_wait_for_another() -> None:
    size = 16 << 20
    sent = bytes(range(256)) * (size // 256)
    async with behind(1.0) as stream, trio.open_nursery() as nursery:
        # If each chunk waited for the one before, 256 chunks would take 512 s.
        nursery.start_soon(stream.send_all, sent)
        with trio.fail_after(60):
            assert await exactly(stream, size) == sent


async def test_bytes_on_their_way_are_bounded() -> None:
    sent = 0

    async def flood(stream: trio.SocketStream) -> None:
        nonlocal sent
        while True:
            await stream.send_all(bytes(1 << 20))
            sent += 1

    async with behind(3600, max_in_flight_bytes=1 << 20) as stream:
        with trio.move_on_after(0.5):
            await flood(stream)
    assert 1 <= sent < 32  # MiB: the proxy's and what the kernel buffers on both sides of it


async def test_an_end_of_sending_is_passed_on_and_answers_still_arrive() -> None:
    async def count(stream: trio.SocketStream) -> None:
        total = 0
        async for data in stream:
            total += len(data)
        await stream.send_all(str(total).encode())
        await stream.send_eof()

    async with behind(0.02, count) as stream:
        await stream.send_all(bytes(1000))
        await stream.send_eof()
        assert await exactly(stream, 4) == b"1000"
        assert await stream.receive_some() == b""


async def test_a_reset_is_passed_on() -> None:
    async def reset(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream.socket.close()

    async with behind(0.02, reset) as stream:
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_while_the_target_is_down_connections_close_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with DelayProxy("127.0.0.1", port, 5.0) as proxy:
            with trio.fail_after(2):
                async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as stream:
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()
