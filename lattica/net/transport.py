"""TCP, Noise and Yamux: dials and listens, and hands out finished connections.

What an accepted socket may cost before it has proved who it is has bounds: a time limit, a number of handshakes at
once (the oldest of the address that holds most makes room), and a length for every message.
"""

from __future__ import annotations

import errno
import logging
import math
import socket as stdlib_socket
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio
from multiaddr import Multiaddr

from lattica.errors import ConfigError, DialError, RemoteProtocolError
from lattica.ids import PeerId
from lattica.net import multistream, sockets, yamux
from lattica.net.addresses import address_of, host_and_port
from lattica.net.connection import MuxedConnection, Traffic
from lattica.net.identity import Identity
from lattica.net.mux import Mux, WindowBudget, make_mux
from lattica.net.noise import PROTOCOL as NOISE
from lattica.net.noise import NoiseHandshake
from lattica.protocols import (
    ANSWER_TIMEOUT_SECONDS,
    DIAL_TIMEOUT_SECONDS,
    HANDSHAKE_TIMEOUT_SECONDS,
    MAX_HANDSHAKES,
)

log = logging.getLogger("lattica.net.transport")

HANDSHAKE_READ_BYTES: Final = 16 * 1024
ACCEPTS_AT_ONCE: Final = 64  # before other tasks get a turn
ACCEPT_PAUSE_SECONDS: Final = 0.5  # when this machine has nothing to accept a connection with
OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})  # files, files, memory, memory

Joined = Callable[[MuxedConnection], None]


class Transport:
    """Dials and listens for one identity."""

    def __init__(self, identity: Identity, *, windows: WindowBudget, traffic: Traffic | None = None) -> None:
        self._identity = identity
        self._windows = windows
        self._traffic = traffic or Traffic()
        self._listeners: list[stdlib_socket.socket] = []
        self._handshakes: dict[trio.CancelScope, str] = {}  # and who it is with, oldest first

    # Listening

    def bind(self, address: Multiaddr) -> None:
        """Open the listening socket of `address`; `serve` accepts on it.

        Raises:
            ConfigError: the address is not ours to use, in use, or not of a kind that we listen on.
        """
        host, port, family = host_and_port(address)
        if family is None:
            raise ConfigError(
                f"cannot listen on {address}: name an IP address, such as /ip4/0.0.0.0/tcp/{port}"
            )
        try:
            self._listeners.append(sockets.listening(host, port, family))
        except OSError as error:
            raise ConfigError(f"cannot listen on {address}: {_advice(error)}") from error

    @property
    def bound(self) -> list[Multiaddr]:
        """What we listen on, with the ports that were taken."""
        return [address_of(sock.getsockname()) for sock in self._listeners]

    async def serve(self, joined: Joined) -> None:
        """Accept on all sockets; call `joined` with each connection that has proved who it is. Until cancelled."""
        async with trio.open_nursery() as nursery:
            for sock in self._listeners:
                nursery.start_soon(self._accept, sock, joined, nursery)

    def close(self) -> None:
        """Stop listening."""
        for sock in self._listeners:
            sockets.close(sock)
        self._listeners.clear()

    async def _accept(self, listener: stdlib_socket.socket, joined: Joined, nursery: trio.Nursery) -> None:
        while listener.fileno() >= 0:
            try:
                await trio.lowlevel.wait_readable(listener.fileno())
            except trio.ClosedResourceError:
                return
            for _ in range(ACCEPTS_AT_ONCE):
                try:
                    sock, name = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if (
                        error.errno not in OUT_OF
                    ):  # the client left again, or a firewall forbids it (accept(2))
                        continue
                    log.warning("cannot accept connections for now: %s", error.strerror)
                    await trio.sleep(ACCEPT_PAUSE_SECONDS)
                    break
                sock.setblocking(False)
                nursery.start_soon(self._prove, sock, name, joined)

    async def _prove(self, sock: stdlib_socket.socket, name: tuple[str, int], joined: Joined) -> None:
        """Find out who dialled. Raises nothing but Cancelled."""
        connection = None
        try:
            with self._place(name[0]), trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS):
                sockets.tune(sock)
                connection = await self._secure(sock, None)
        except (RemoteProtocolError, trio.TooSlowError, OSError) as error:
            log.debug("the handshake with %s failed: %s", name[0], error or type(error).__name__)
        except Exception:  # a bug of ours must not become everybody's
            log.exception("the handshake with %s failed", name[0])
        finally:
            if connection is None:
                sockets.close(sock)
        if connection is not None:
            joined(connection)

    def _place(self, host: str) -> _Place:
        """A place among the handshakes; whoever is pushed out of it is cancelled, and goes on behind the block."""
        place = _Place(self._handshakes, host)
        if len(self._handshakes) >= MAX_HANDSHAKES:
            crowd = Counter(self._handshakes.values()).most_common(1)[0][0]
            oldest = next(scope for scope, other in self._handshakes.items() if other == crowd)
            del self._handshakes[oldest]
            oldest.cancel()
        return place

    # Dialling

    async def connect(self, address: Multiaddr, *, from_listen_port: bool = False) -> MuxedConnection:
        """Connect, prove identities, agree on the muxer: a connection that is ready to run.

        The address must end in /p2p/ID, and who answers must be that peer.

        Args:
            from_listen_port: dial from a port that we listen on, so that a NAT shows the peer the same address
                that others dial: hole punching needs it.

        Raises:
            DialError: what went wrong, for people.
        """
        expected = PeerId.parse(address.value_for_protocol("p2p") or "")
        try:
            with trio.fail_after(DIAL_TIMEOUT_SECONDS):
                sock, answer_by = await self._open(address, from_listen_port=from_listen_port)
                try:
                    return await self._secure(sock, expected, answer_by=answer_by)
                except BaseException:
                    sockets.close(sock)
                    raise
        except trio.TooSlowError as error:
            raise DialError(f"no answer within {DIAL_TIMEOUT_SECONDS:g} seconds") from error
        except (RemoteProtocolError, ValueError) as error:
            raise DialError(str(error)) from error
        except OSError as error:
            raise DialError(error.strerror or str(error)) from error

    async def _open(
        self, address: Multiaddr, *, from_listen_port: bool
    ) -> tuple[stdlib_socket.socket, float]:
        """A TCP connection to the first of the name's addresses that takes it, and when it must have answered.

        Raises OSError, DialError.
        """
        name, port, _ = host_and_port(address)
        family = {"4": stdlib_socket.AF_INET, "6": stdlib_socket.AF_INET6}.get(
            address.protocols()[0].name[-1], 0
        )
        found = await trio.socket.getaddrinfo(name, port, family, stdlib_socket.SOCK_STREAM)
        failure: Exception = DialError(f"{name} has no address")
        for kind, _, _, _, target in found:
            host = str(target[0])
            source = None
            if from_listen_port:
                source = sockets.dialling_from(self._listeners, host, kind)
                if source is None:
                    failure = DialError(f"this node listens on no address from which it could dial {host}")
                    continue
            answer_by = trio.current_time() + ANSWER_TIMEOUT_SECONDS
            try:
                with trio.fail_at(answer_by):
                    return await sockets.connected(host, port, kind, source=source), answer_by
            except trio.TooSlowError:
                failure = DialError(f"no answer within {ANSWER_TIMEOUT_SECONDS:g} seconds")
            except OSError as error:
                failure = error
        raise failure

    # Both

    async def _secure(
        self, sock: stdlib_socket.socket, expected: PeerId | None, *, answer_by: float = math.inf
    ) -> MuxedConnection:
        """Negotiate /noise, shake hands, negotiate /yamux/1.0.0 inside; `expected` None: we were dialled."""
        initiator = expected is not None
        pipe = sockets.Pipe(sock, answer_by=answer_by)
        handshake = NoiseHandshake(self._identity, initiator=initiator, expected=expected)
        if initiator:
            chosen, early = await multistream.offer(pipe, [NOISE], then=handshake.start())
            if chosen is None:
                raise RemoteProtocolError(f"the other side does not speak {NOISE}")
        else:
            _, early = await multistream.answer(pipe, {NOISE})
        reply = handshake.receive(early)
        while handshake.result is None:
            if reply:
                await pipe.send_all(reply)
            data = await pipe.receive_some(HANDSHAKE_READ_BYTES)
            if not data:
                raise RemoteProtocolError("the other side closed the connection during the handshake")
            reply = handshake.receive(data)
        secured = handshake.result
        machine = make_mux(
            initiator=initiator,
            send_key=secured.send_key,
            receive_key=secured.receive_key,
            windows=self._windows,
        )
        sealed = _SealedPipe(pipe, machine, early=secured.early, last=reply)
        if initiator:
            chosen, early = await multistream.offer(sealed, [yamux.PROTOCOL])
            if chosen is None:
                raise RemoteProtocolError(f"the other side does not speak {yamux.PROTOCOL}")
        else:
            _, early = await multistream.answer(sealed, {yamux.PROTOCOL})
        return MuxedConnection(
            sock,
            machine,
            peer=secured.peer,
            initiator=initiator,
            early=early,
            remote=address_of(sock.getpeername()),
            traffic=self._traffic,
        )


class _Place:
    """One handshake's place among those that run, for the time of a block."""

    def __init__(self, places: dict[trio.CancelScope, str], host: str) -> None:
        self._places = places
        self._host = host
        self._scope = trio.CancelScope()

    def __enter__(self) -> None:
        self._scope.__enter__()
        self._places[self._scope] = self._host

    def __exit__(self, *raised: object) -> bool | None:
        self._places.pop(self._scope, None)
        return self._scope.__exit__(*raised)  # type: ignore[arg-type]  # three of them, as every context manager's


class _SealedPipe:
    """A TCP stream inside Noise records, as the negotiation sees it.

    Args:
        early: what was read behind the handshake.
        last: the handshake's last message, which leaves with the first record.
    """

    def __init__(self, pipe: sockets.Pipe, machine: Mux, *, early: bytes, last: bytes) -> None:
        self._pipe = pipe
        self._machine = machine
        self._early = early
        self._last = last

    async def send_all(self, data: bytes) -> None:
        last, self._last = self._last, b""
        await self._pipe.send_all(last + self._machine.seal(data))

    async def receive_some(self, max_bytes: int) -> bytes:
        plain, self._early = self._machine.open(self._early) if self._early else b"", b""
        while not plain:
            data = await self._pipe.receive_some(max_bytes)
            if not data:
                return b""
            plain = self._machine.open(data)
        return plain


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
