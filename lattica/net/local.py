"""Streams that stay on this machine: a Unix socket's, or a pair from a node to itself. No libp2p."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import trio

from lattica.errors import StreamError
from lattica.ids import PeerId


class LocalStream:
    """A socket as `lattica.net.api.Stream`. `peer` is None for a user of this machine, else the node itself."""

    def __init__(
        self, stream: trio.SocketStream, *, peer: PeerId | None = None, protocol: str = "/unix"
    ) -> None:
        self._stream = stream
        self._peer = peer
        self.protocol = protocol

    @property
    def peer(self) -> Any:
        return self._peer

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with _stream_errors():
            await self._stream.send_all(memoryview(data))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        with _stream_errors():
            return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        with _stream_errors():
            await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def reset(self) -> None:
        self._stream.socket.close()


def stream_pair(peer: PeerId, protocol: str) -> tuple[LocalStream, LocalStream]:
    """Two ends of a stream from a node to itself.

    The kernel's socket buffers hold a fast sender back, as a connection's window would.
    """
    left, right = trio.socket.socketpair()
    return (
        LocalStream(trio.SocketStream(left), peer=peer, protocol=protocol),
        LocalStream(trio.SocketStream(right), peer=peer, protocol=protocol),
    )


@contextlib.contextmanager
def _stream_errors() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise StreamError("the other end of a local stream is gone") from error
