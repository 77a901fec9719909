"""Streams that stay on this machine: a Unix socket's, or a pair from a node to itself. No libp2p."""

from __future__ import annotations

import select
import socket as stdlib_socket
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from lattica.errors import LocalProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net.sockets import close
from lattica.protocols import KIB

READ_BYTES: Final = 64 * KIB
PAIR_BYTES: Final = 256 * KIB  # unread in one direction of a pair; then its sender waits, as for a window
LOOK_SECONDS: Final = 0.25  # between two looks whether the other end of a socket hung up

Piece = bytes | bytearray | memoryview


class LocalStream:
    """A Unix socket as `lattica.net.api.Stream`. `peer` is None: a user of this machine has no peer id."""

    def __init__(self, stream: trio.SocketStream, *, protocol: str = "/unix") -> None:
        self.protocol = protocol
        self._sock = stdlib_socket.socket(fileno=stream.socket.detach())
        self._sock.setblocking(False)
        self._on_break: Callable[[], None] | None = None
        self._watching = False

    @property
    def peer(self) -> Any:
        return None

    async def send_all(self, data: Piece) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        rest = memoryview(data).cast("B")
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
            except OSError as error:
                raise _gone() from error

    def send_nowait(self, parts: Sequence[Piece]) -> bool:
        """Always False: a socket doesn't say whether it has room for all of it."""
        return False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while (data := self.receive_nowait(max_bytes)) is None:
            await self._wait(trio.lowlevel.wait_readable)
        return data

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        try:
            return self._sock.recv(READ_BYTES if max_bytes is None else max_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _gone() from error

    async def receive_into(self, buffer: memoryview, enough: int = 1) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                return self._sock.recv_into(buffer)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
            except OSError as error:
                raise _gone() from error

    async def _wait(self, ready: Any) -> None:
        if self._sock.fileno() < 0:
            raise _gone()
        try:
            await ready(self._sock.fileno())
        except trio.ClosedResourceError as error:
            raise _gone() from error

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._sock.shutdown(stdlib_socket.SHUT_WR)
        except OSError as error:
            raise _gone() from error

    async def aclose(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        self._on_break = None
        close(self._sock)

    def on_break(self, callback: Callable[[], None] | None) -> None:
        """As `lattica.net.api.Stream.on_break`; a socket tells only that the other end closed, not how."""
        self._on_break = callback
        if callback is not None and not self._watching:
            self._watching = True
            trio.lowlevel.spawn_system_task(self._watch)

    async def _watch(self) -> None:
        """Look at intervals: bytes that nobody reads hide a hang-up from every wait that trio offers."""
        poll = select.poll()
        try:
            while self._on_break is not None and self._sock.fileno() >= 0:
                poll.register(self._sock, 0)  # errors and hang-ups are told without asking
                if poll.poll(0):
                    callback, self._on_break = self._on_break, None
                    callback()
                    return
                await trio.sleep(LOOK_SECONDS)
        finally:
            self._watching = False


class PairStream:
    """One end of a stream from a node to itself, in memory. Made by `stream_pair`."""

    def __init__(self, peer: PeerId, protocol: str, inward: _Lane, outward: _Lane) -> None:
        self.peer = peer
        self.protocol = protocol
        self._in = inward
        self._out = outward
        self._left = False
        self._on_break: Callable[[], None] | None = None
        self._other: PairStream

    async def send_all(self, data: Piece) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        rest = memoryview(data).cast("B")
        while rest:
            self._check()
            size = max(0, PAIR_BYTES - len(self._out.unread))
            self._out.put(rest[:size])
            rest = rest[size:]
            if rest and not self._out.is_dropped:
                await self._out.changed.park()
        self._check()

    def send_nowait(self, parts: Sequence[Piece]) -> bool:
        self._check()
        if len(self._out.unread) + sum(map(len, parts)) > PAIR_BYTES:
            return False
        for part in parts:
            self._out.put(part)
        return True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while (data := self.receive_nowait(max_bytes)) is None:
            await self._in.changed.park()
        return data

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        if self._left:
            raise StreamError("the stream was closed by this side")
        if self._in.is_broken:
            raise _gone()
        if self._in.unread:
            return self._in.take(max_bytes)
        return b"" if self._in.is_ended else None

    async def receive_into(self, buffer: memoryview, enough: int = 1) -> int:
        data = await self.receive_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self._out.end()

    async def aclose(self) -> None:
        if not self._left:
            self._left = True
            self._on_break = None
            self._out.end()
            self._in.drop()  # what comes is dropped: the sender must not wait for a reader
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        if not self._left:
            self._left = True
            self._on_break = None
            self._in.break_off()
            self._out.break_off()
            self._other._tell()

    def on_break(self, callback: Callable[[], None] | None) -> None:
        self._on_break = callback
        if self._in.is_broken:
            self._tell()

    def _tell(self) -> None:
        callback, self._on_break = self._on_break, None
        if callback is not None:
            callback()

    def _check(self) -> None:
        if self._left:
            raise StreamError("the stream was closed by this side")
        if self._out.is_broken:
            raise _gone()
        if self._out.is_ended:
            raise LocalProtocolError("nothing can be sent on a stream after send_eof")


class _Lane:
    """One direction of a pair."""

    def __init__(self) -> None:
        self.unread = bytearray()
        self.is_ended = False
        self.is_broken = False
        self.is_dropped = False  # nobody reads any more
        self.changed = trio.lowlevel.ParkingLot()

    def put(self, data: Piece) -> None:
        if data and not self.is_dropped:
            self.unread += data
            self.changed.unpark_all()

    def take(self, max_bytes: int | None) -> bytes:
        data = bytes(self.unread[:max_bytes])
        del self.unread[:max_bytes]
        self.changed.unpark_all()
        return data

    def end(self) -> None:
        self.is_ended = True
        self.changed.unpark_all()

    def drop(self) -> None:
        self.is_dropped = True
        self.unread.clear()
        self.changed.unpark_all()

    def break_off(self) -> None:
        self.is_broken = True
        self.unread.clear()
        self.changed.unpark_all()


def stream_pair(peer: PeerId, protocol: str) -> tuple[PairStream, PairStream]:
    """Two ends of a stream from a node to itself; a fast sender waits for its reader."""
    there, back = _Lane(), _Lane()
    left, right = PairStream(peer, protocol, back, there), PairStream(peer, protocol, there, back)
    left._other, right._other = right, left
    return left, right


def _gone() -> StreamError:
    return StreamError("the other end of a local stream is gone")
