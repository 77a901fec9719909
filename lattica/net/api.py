"""What the rest of the project may ask of a network: three Protocols and one value.

`lattica.net.host` implements them over libp2p, `lattica.testing.MemoryNetwork` in one process under a
virtual clock. Nothing here knows which. No I/O.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lattica.ids import PeerId

Path = Literal["direct", "punched", "relayed"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer, as known now."""

    peer_id: PeerId
    path: Path = "direct"
    rtt: float | None = None  # seconds, smoothed; None before the first ping
    addresses: tuple[str, ...] = ()  # multiaddrs, without /p2p/
    agent: str = ""
    protocols: tuple[str, ...] = ()
    via: PeerId | None = None  # the relay, when the path is relayed
    seen: float = 0.0  # seconds since it was last heard of
    inbound: bool = field(default=False)


class Stream(Protocol):
    """A two-way stream of bytes to one peer under one protocol. Fits trio's HalfCloseableStream."""

    @property
    def peer(self) -> PeerId: ...

    @property
    def protocol(self) -> str: ...

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; waits for the other side's window. Raises StreamError.

        A cancelled send leaves the stream unusable (the bytes may be half sent) and the connection whole:
        call `reset()` then.
        """

    def send_nowait(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Queue all parts, as one piece, if there is room for all of them.

        False queues nothing: take `send_all` then, which waits for room. Raises StreamError.
        """

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, as soon as there are any; b"" only after the other side's `send_eof`.

        Raises StreamError when the stream was reset or its connection lost. Cancel-safe: nothing is lost.
        """

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """What is here; None when nothing is, b"" after the other side's end. Raises StreamError."""

    async def receive_into(self, buffer: memoryview, enough: int = 1) -> int:
        """As `receive_some`, straight into `buffer`; returns how many bytes, 0 after the other side's end.

        `enough` says how many more are sure to come: a stream may wait for up to so many before it wakes its reader,
        who is spared a wake-up for each small part of a large message.
        """

    def on_break(self, callback: Callable[[], None] | None) -> None:
        """Call back once when the other side resets the stream or its connection is lost, whatever is unread.

        At once, if it is so already. Not for a mere end of the other side, and not for what this side does.
        None takes the callback back. It must not wait and must not raise.
        """

    async def send_eof(self) -> None:
        """Say that no more bytes come from here; reading goes on."""

    async def aclose(self) -> None:
        """Close both directions; bytes already sent still arrive."""

    def reset(self) -> None:
        """Break the stream off at once, both sides; never waits, may be called twice."""


StreamHandler = Callable[[Stream], Awaitable[None]]
PeerListener = Callable[[PeerId, bool], None]


class Host(Protocol):
    """One peer's place in the network."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> list[str]:
        """Dialable multiaddrs of ours, with /p2p/, no wildcards."""

    def peers(self) -> list[Peer]:
        """The peers that we are connected to."""

    async def connect(self, address: str) -> PeerId:
        """Dial a multiaddr that ends in /p2p/ID; returns once the peer is in `peers()`. Raises DialError."""

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer; nothing happens when there is none."""

    async def open_stream(self, peer: PeerId, protocols: Sequence[str]) -> Stream:
        """Open a stream under the first protocol that the peer speaks; dials a known peer by itself.

        Raises UnreachableError (no address), DialError, StreamError (it speaks none of them).
        """

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Hand each inbound stream under `protocol` to `handler`, in a task of its own.

        The stream is closed when the handler returns, reset when it raises; a handler that raises never
        takes the node down. LocalProtocolError when the protocol is served already.
        """

    def unserve(self, protocol: str) -> None:
        """Stop handing out streams under `protocol`; running handlers finish."""

    def add_addresses(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Remember where a peer may be dialled (from a record, say)."""

    async def ping(self, peer: PeerId) -> float:
        """One round trip in seconds, measured now. Raises as `open_stream` does."""

    def watch(self, listener: PeerListener) -> Callable[[], None]:
        """Call `listener(peer, connected)` on the first connection and the last disconnection of each peer.

        Returns a function that ends it. Listeners must not wait and must not raise.
        """
