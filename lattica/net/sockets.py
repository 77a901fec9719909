"""TCP sockets as this room uses them: options, dialling, and the bytes of a handshake. All non-blocking.

trio's own sockets pass through the scheduler on each call, also when there is nothing to wait for. Here a task
waits only when the kernel has said that it must.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket as stdlib_socket
import sys
from collections.abc import Sequence
from typing import Final

import trio

from lattica.protocols import PING_TIMEOUT_SECONDS, UNSENT_BYTES

_TCP_USER_TIMEOUT: Final = getattr(stdlib_socket, "TCP_USER_TIMEOUT", None)  # Linux
# Python before 3.12 does not name it.
_TCP_NOTSENT_LOWAT: Final = {"linux": 25, "darwin": 0x201}.get(sys.platform)
BACKLOG: Final = 256  # connections that the kernel accepts for us

Family = stdlib_socket.AddressFamily


def tune(sock: stdlib_socket.socket) -> None:
    """Set what a connection of ours needs; what a platform lacks is left out."""
    sock.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)  # the mux batches already
    with contextlib.suppress(OSError):
        if _TCP_NOTSENT_LOWAT is not None:
            sock.setsockopt(stdlib_socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if (
            _TCP_USER_TIMEOUT is not None
        ):  # bytes that nobody acknowledges: a cut cable, a machine that is gone
            sock.setsockopt(stdlib_socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(PING_TIMEOUT_SECONDS * 1000))


def listening(host: str, port: int, family: Family) -> stdlib_socket.socket:
    """A listening socket. Raises OSError."""
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
        if family == stdlib_socket.AF_INET6:
            sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        # After the bind, so that a port which another node listens on is refused and not shared with it; sockets
        # that dial from this port have the option before theirs.
        sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def dialling_from(
    listeners: Sequence[stdlib_socket.socket], host: str, family: Family
) -> tuple[str, int] | None:
    """Which of our listening addresses to dial `host` from; None when none of them leads there."""
    loopback = _is_loopback(host)
    for sock in listeners:
        if sock.family == family:
            bound, port = sock.getsockname()[:2]
            if bound in ("0.0.0.0", "::") or _is_loopback(bound) == loopback:
                return bound, port
    return None


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


async def connected(
    host: str, port: int, family: Family, *, source: tuple[str, int] | None = None
) -> stdlib_socket.socket:
    """A TCP connection, from the address `source` when there is one. Raises OSError; cancelled it leaves nothing."""
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if source is not None:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
            sock.bind(source)
        code = sock.connect_ex((host, port))
        if code in (errno.EINPROGRESS, errno.EAGAIN):
            await trio.lowlevel.wait_writable(sock.fileno())
            code = sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def close(sock: stdlib_socket.socket) -> None:
    """Close a socket that tasks may be waiting for: they get trio.ClosedResourceError."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock.fileno())
        sock.close()


class Pipe:
    """A socket's bytes during the handshake.

    Args:
        answer_by: when the first of them must have come, on trio's clock. Raises TimeoutError beyond.
    """

    def __init__(self, sock: stdlib_socket.socket, *, answer_by: float = math.inf) -> None:
        self._sock = sock
        self._answer_by = answer_by

    async def send_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock.fileno())

    async def receive_some(self, max_bytes: int) -> bytes:
        while True:
            with trio.move_on_at(self._answer_by) as waiting:
                await trio.lowlevel.wait_readable(self._sock.fileno())
            if waiting.cancelled_caught:
                raise TimeoutError("connected, but no answer in time")
            with contextlib.suppress(BlockingIOError):
                data = self._sock.recv(max_bytes)
                self._answer_by = math.inf
                return data
