"""TCP, Noise and Yamux as one libp2p transport: dials and listens, and hands out finished connections.

What an accepted socket may cost before it has proved who it is has bounds: a time limit, a number of
handshakes at once (the oldest makes room), and a length for every message.
"""

from __future__ import annotations

import errno
import logging
import socket as stdlib_socket
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import trio
from libp2p.abc import IListener, IRawConnection, ITransport
from libp2p.custom_types import THandler
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from lattica.errors import ConfigError, RemoteProtocolError
from lattica.ids import PeerId
from lattica.net import multistream, yamux
from lattica.net.addresses import address_of, host_and_port
from lattica.net.connection import MuxedConnection
from lattica.net.identity import Identity
from lattica.net.noise import PROTOCOL as NOISE
from lattica.net.noise import NoiseHandshake, NoiseSession, Secured
from lattica.protocols import DIAL_TIMEOUT_SECONDS, HANDSHAKE_TIMEOUT_SECONDS

log = logging.getLogger("lattica.net.transport")

MAX_HANDSHAKES = 64  # unproven inbound sockets at once: each may hold a few KiB and a task
BACKLOG = 256  # sockets that the kernel accepts for us
HANDSHAKE_READ_BYTES = 16 * 1024


class Transport(ITransport):
    """Dials and listens for one identity. Listening sockets are bound by `bind`, before libp2p knows of
    them.
    """

    provides_native_muxing = True

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._bound: dict[str, list[trio.SocketListener]] = {}

    async def bind(self, address: Multiaddr) -> None:
        """Open the listening socket of `address`, so that listening on it can't fail any more.

        Raises:
            ConfigError: the address is not ours to use, in use, or not of a kind that we listen on.
        """
        host, port, family = host_and_port(address)
        if family is None:
            raise ConfigError(
                f"cannot listen on {address}: name an IP address, such as /ip4/0.0.0.0/tcp/{port}"
            )
        sock = trio.socket.socket(family, stdlib_socket.SOCK_STREAM)
        try:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
            if family == stdlib_socket.AF_INET6:
                sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
            await sock.bind((host, port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigError(f"cannot listen on {address}: {_advice(error)}") from error
        except BaseException:
            sock.close()
            raise
        self._bound.setdefault(str(address), []).append(trio.SocketListener(sock))

    def take_bound(self, address: Multiaddr) -> Sequence[trio.SocketListener]:
        """The sockets that `bind` opened for an address; the caller owns them now."""
        return self._bound.pop(str(address), [])

    def close_bound(self) -> None:
        """Close the sockets that nobody took."""
        for listeners in self._bound.values():
            for listener in listeners:
                listener.socket.close()
        self._bound.clear()

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect, prove identities, agree on the muxer: a connection that is ready to start.

        The address must end in /p2p/ID, and who answers must be that peer.

        Raises:
            OpenConnectionError: what went wrong, for people.
        """
        connection: Any = await self.connect(maddr)  # libp2p takes an IMuxedConn here and says so nowhere
        return connection  # type: ignore[no-any-return]

    async def connect(self, address: Multiaddr) -> MuxedConnection:
        """As `dial`, with its true type."""
        expected = PeerId.parse(address.value_for_protocol("p2p") or "")
        try:
            with trio.fail_after(DIAL_TIMEOUT_SECONDS):
                stream = await _open(address)
                try:
                    return await _secure(stream, self._identity, expected)
                except BaseException:
                    stream.socket.close()
                    raise
        except trio.TooSlowError as error:
            raise OpenConnectionError(f"no answer within {DIAL_TIMEOUT_SECONDS:g} seconds") from error
        except (RemoteProtocolError, ValueError) as error:
            raise OpenConnectionError(str(error)) from error
        except OSError as error:
            raise OpenConnectionError(_reason(error)) from error
        except trio.BrokenResourceError as error:
            raise OpenConnectionError("the other side closed the connection during the handshake") from error

    def create_listener(self, handler_function: THandler) -> IListener:
        return Listener(self, self._identity, handler_function)

    def can_dial(self, maddr: Multiaddr) -> bool:
        names = [protocol.name for protocol in maddr.protocols()]
        return names[1:2] == ["tcp"] and names[2:] in ([], ["p2p"])

    def can_listen(self, maddr: Multiaddr) -> bool:
        return self.can_dial(maddr)

    def protocols(self) -> list[str]:
        return ["tcp"]


class Listener(IListener):
    """Accepts on sockets that the transport bound, and hands each proven connection to libp2p."""

    background_nursery: trio.Nursery  # libp2p sets it before it calls `listen`

    def __init__(self, transport: Transport, identity: Identity, handler: THandler) -> None:
        self._transport = transport
        self._identity = identity
        self._handler = handler
        self._scope = trio.CancelScope()
        self._listeners: list[trio.SocketListener] = []
        self._handshakes: OrderedDict[trio.CancelScope, None] = OrderedDict()

    async def listen(self, maddr: Multiaddr) -> None:
        self._listeners.extend(self._transport.take_bound(maddr))
        await self.background_nursery.start(self._serve)

    async def _serve(self, task_status: Any) -> None:
        with self._scope:
            await trio.serve_listeners(self._accepted, self._listeners, task_status=task_status)

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(address_of(listener.socket.getsockname()) for listener in self._listeners)

    async def close(self) -> None:
        self._scope.cancel()
        for listener in self._listeners:
            listener.socket.close()
        self._listeners.clear()
        await trio.lowlevel.checkpoint()

    async def _accepted(self, stream: trio.SocketStream) -> None:
        """Prove who dialled, and stay until the connection ends: libp2p's slot is freed with this task."""
        try:
            connection = await self._handshake(stream)
        except (RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError, OSError) as error:
            log.debug("an inbound handshake failed: %s", error or type(error).__name__)
            stream.socket.close()
            return
        except Exception:  # a bug of ours must not become everybody's
            log.exception("an inbound handshake failed")
            stream.socket.close()
            return
        except BaseException:
            stream.socket.close()
            raise
        if connection is None:
            stream.socket.close()
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handler, connection)
                await connection.ended.wait()
                nursery.cancel_scope.cancel()
        except Exception:  # libp2p's registration: its failure costs this connection and nothing else
            log.exception("could not register the connection from %s", connection.peer)
        finally:
            connection.abort("this node stopped")

    async def _handshake(self, stream: trio.SocketStream) -> MuxedConnection | None:
        """A proven connection; None when it had to make room for newer ones."""
        scope = trio.CancelScope()
        self._handshakes[scope] = None
        if len(self._handshakes) > MAX_HANDSHAKES:
            oldest, _ = self._handshakes.popitem(last=False)
            oldest.cancel()
        connection = None
        try:
            with scope, trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS):
                connection = await _secure(stream, self._identity, None)
        finally:
            self._handshakes.pop(scope, None)
        return connection


async def _secure(stream: trio.SocketStream, identity: Identity, expected: PeerId | None) -> MuxedConnection:
    """Negotiate /noise, shake hands, negotiate /yamux/1.0.0 inside; `expected` None: we were dialled."""
    initiator = expected is not None
    if initiator:
        chosen, early = await multistream.offer(stream, [NOISE])
        if chosen is None:
            raise RemoteProtocolError(f"the other side does not speak {NOISE}")
    else:
        _, early = await multistream.answer(stream, {NOISE})
    handshake = NoiseHandshake(identity, initiator=initiator, expected=expected)
    if initiator:
        await stream.send_all(handshake.start())
    reply = handshake.receive(early)
    while True:
        if reply:
            await stream.send_all(reply)
        if handshake.result is not None:
            break
        data = await stream.receive_some(HANDSHAKE_READ_BYTES)
        if not data:
            raise RemoteProtocolError("the other side left during the handshake")
        reply = handshake.receive(bytes(data))
    secured: Secured = handshake.result
    sealed = _SealedPipe(stream, secured.session)
    if initiator:
        chosen, early = await multistream.offer(sealed, [yamux.PROTOCOL])
        if chosen is None:
            raise RemoteProtocolError(f"the other side does not speak {yamux.PROTOCOL}")
    else:
        _, early = await multistream.answer(sealed, {yamux.PROTOCOL})
    return MuxedConnection(
        stream,
        secured.session,
        peer=secured.peer,
        initiator=initiator,
        early=early,
        remote=address_of(stream.socket.getpeername()),
    )


class _SealedPipe:
    """A TCP stream inside a Noise session, as the negotiation sees it."""

    def __init__(self, stream: trio.SocketStream, session: NoiseSession) -> None:
        self._stream = stream
        self._session = session

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(self._session.encrypt([data]))

    async def receive_some(self, max_bytes: int) -> bytes:
        plains = self._session.receive(b"")
        while not plains:
            data = await self._stream.receive_some(max_bytes)
            if not data:
                return b""
            plains = self._session.receive(bytes(data))
        return b"".join(plains)


async def _open(address: Multiaddr) -> trio.SocketStream:
    host, port, _ = host_and_port(address)
    first = address.protocols()[0].name
    if first in ("dns4", "dns6"):
        family = stdlib_socket.AF_INET if first == "dns4" else stdlib_socket.AF_INET6
        found = await trio.socket.getaddrinfo(host, port, family, stdlib_socket.SOCK_STREAM)
        host = found[0][4][0]
    return await trio.open_tcp_stream(host, port)


def _reason(error: OSError) -> str:
    """Why a dial failed: trio puts "all attempts failed" around what the system said."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else error.strerror or str(error)


def _advice(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is in use; stop the other program or take another port (0: any free one)"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address; /ip4/0.0.0.0 listens on all that it has"
        case errno.EACCES:
            return "this user may not use the port; take one above 1023"
        case _:
            return f"{error.strerror}; try another address or port"
