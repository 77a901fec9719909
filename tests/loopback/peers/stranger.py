"""A peer that speaks as the specifications say until it chooses not to. Nothing here is the node's own code.

Noise comes from the `noiseprotocol` library, the rest from the specifications: what the node's own encoder could not
be made to write can be written here, and a mistake that node and test would share is none that a test can find.

Sources: github.com/libp2p/specs (noise, connections, identify), github.com/hashicorp/yamux/blob/master/spec.md,
github.com/multiformats/multistream-select, docs/wire.md.
"""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import base58
import msgpack
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from libp2p.security.noise.pb.noise_pb2 import NoiseHandshakePayload
from noise.connection import Keypair, NoiseConnection

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")
RPC = "/lattica/rpc/1.0.0"
GREETING = "/multistream/1.0.0"
RECORD_BYTES = 65_000
INITIAL_WINDOW = 256 * 1024
SETTLED = 0x5E77_1ED0  # what a ping carries that asks whether all has been read


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def negotiation(*names: str) -> bytes:
    return b"".join(varint(len(name) + 1) + name.encode() + b"\n" for name in names)


def rpc_frame(value: Any, section: bytes = b"") -> bytes:
    """A frame of the RPC protocol around any msgpack value."""
    array = msgpack.packb(value)
    return varint(len(array)) + varint(len(section)) + array + section


def request(method: str, *args: Any, timeout: float | None = None, more: bool = False) -> bytes:
    return rpc_frame([0, method, list(args), timeout, "", more])


@dataclass
class Stranger:
    """One connection to a node. Reads only when asked to: `outcome`, `read`, `drain`."""

    stream: trio.SocketStream
    noise: NoiseConnection
    peer_id: str
    data: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    asked: list[int] = field(default_factory=list)  # streams that the node opened
    over: dict[int, str] = field(default_factory=dict)
    spent: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # of each stream's window
    granted: dict[int, int] = field(
        default_factory=lambda: defaultdict(int)
    )  # beyond the window it began with
    pongs: set[int] = field(default_factory=set)
    closed: bool = False
    _sealed: bytearray = field(default_factory=bytearray)
    _plain: bytearray = field(default_factory=bytearray)
    _next: int = 1

    # Bytes

    async def send_raw(self, data: bytes) -> None:
        """Bytes under Noise. A connection that the node has closed is no error: it shows in `outcome`."""
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            self.closed = True

    async def send(self, plain: bytes) -> None:
        records = bytearray()
        for at in range(0, len(plain), RECORD_BYTES):
            sealed = self.noise.encrypt(plain[at : at + RECORD_BYTES])
            records += len(sealed).to_bytes(2, "big") + sealed
        await self.send_raw(bytes(records))

    async def _receive(self) -> bool:
        """Read once; False at the end."""
        try:
            data = await self.stream.receive_some(1 << 18)
        except trio.BrokenResourceError:
            data = b""
        self._sealed += data
        while len(self._sealed) >= 2 and len(self._sealed) >= 2 + (
            size := int.from_bytes(self._sealed[:2], "big")
        ):
            self._plain += self.noise.decrypt(bytes(self._sealed[2 : 2 + size]))
            del self._sealed[: 2 + size]
        self.closed |= not data
        return bool(data)

    def hang_up_rudely(self) -> None:
        """Close with a TCP reset, as a process does that dies with bytes unread."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    # Frames

    async def frame(
        self, kind: int, flags: int, stream: int, data: bytes = b"", *, length: int | None = None
    ) -> None:
        await self.send(header(kind, flags, stream, len(data) if length is None else length) + data)

    async def write(self, stream: int, data: bytes, *, flags: int = 0) -> None:
        self.spent[stream] += len(data)
        await self.frame(DATA, flags, stream, data)

    async def write_long(self, stream: int, data: bytes) -> None:
        """As `write`, waiting for the node's credit; stops when the stream is over."""
        while data and stream not in self.over and not self.closed:
            room = INITIAL_WINDOW + self.granted[stream] - self.spent[stream]
            piece, data = data[: min(room, 16_384)], data[min(room, 16_384) :]
            if piece:
                await self.write(stream, piece)
            else:
                await self._step()

    async def _step(self) -> None:
        """Take one frame from the node."""
        while True:
            if len(self._plain) >= HEADER.size:
                _, kind, flags, stream, length = HEADER.unpack_from(self._plain)
                size = HEADER.size + (length if kind == DATA else 0)
                if len(self._plain) >= size:
                    break
            if not await self._receive():
                return
        body = bytes(self._plain[HEADER.size : size])
        del self._plain[:size]
        if kind == PING and flags & SYN:
            await self.frame(PING, ACK, 0, length=length)
        if stream and flags & SYN:
            self.asked.append(stream)
        if kind == PING and flags & ACK:
            self.pongs.add(length)
        if kind == WINDOW_UPDATE:
            self.granted[stream] += length
        self.data[stream] += body
        if flags & (RST | FIN):
            self.over.setdefault(stream, "reset" if flags & RST else "ended")

    async def read(self, stream: int, size: int) -> bytes:
        """At least `size` bytes of a stream, fewer when it ends before."""
        while len(self.data[stream]) < size and stream not in self.over and not self.closed:
            await self._step()
        return bytes(self.data[stream])

    async def outcome(self, stream: int) -> str:
        """How a stream ended: "reset" or "ended" by the node, or "closed" with its connection."""
        while stream not in self.over and not self.closed:
            await self._step()
        return self.over.get(stream, "closed")

    async def until_closed(self) -> None:
        while not self.closed:
            await self._step()

    async def settled(self) -> None:
        """Wait until the node has read everything that was sent, or has closed the connection."""
        await self.frame(PING, SYN, 0, length=SETTLED)
        while SETTLED not in self.pongs and not self.closed:
            await self._step()

    async def asked_for(self, protocol: str) -> int:
        """Wait until the node opens a stream under `protocol`, agree to it, and give it."""
        wish = negotiation(GREETING, protocol)
        while not self.closed:
            for stream in self.asked:
                if self.data[stream].startswith(wish):
                    self.asked.remove(stream)
                    await self.write(stream, wish)
                    return stream
            await self._step()
        raise AssertionError(f"the node never asked for {protocol}")

    # Streams

    async def open(self, protocol: str | None = None) -> int:
        """A new stream; with a protocol agreed on, nothing of it left unread."""
        stream, self._next = self._next, self._next + 2
        await self.frame(WINDOW_UPDATE, SYN, stream, length=0)
        if protocol is not None:
            wish = negotiation(GREETING, protocol)
            await self.write(stream, wish)
            assert await self.read(stream, len(wish)) == wish
            self.data[stream].clear()
        return stream

    async def call(self, method: str, *args: Any) -> Any:
        """An honest call on a stream of its own; its result."""
        stream = await self.open(RPC)
        await self.write(stream, request(method, *args))
        answer = await self.read(stream, 3)
        assert answer[0] < 0x80, "only short answers are read here"
        answer = await self.read(stream, 2 + answer[0])
        kind, result = msgpack.unpackb(answer[2 : 2 + answer[0]])
        assert kind == 2, result
        await self.frame(WINDOW_UPDATE, FIN, stream, length=0)
        return result


def header(kind: int, flags: int, stream: int, length: int, *, version: int = 0) -> bytes:
    return HEADER.pack(version, kind, flags, stream, length)


@asynccontextmanager
async def stranger(
    port: int, *, pause: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[Stranger]:
    """A connection to 127.0.0.1:port, secured and multiplexed, from a peer that nobody has seen before.

    `pause` is waited for in the middle of the handshake.
    """
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        yield await _secured(stream, pause)
    finally:
        stream.socket.close()


async def _secured(stream: trio.SocketStream, pause: Callable[[], Awaitable[None]] | None) -> Stranger:
    pipe = _Plain(stream)
    wish = negotiation(GREETING, "/noise")
    await stream.send_all(wish)
    assert await pipe.exactly(len(wish)) == wish
    if pause is not None:
        await pause()
    identity, static = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
    noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
    noise.set_keypair_from_private_bytes(Keypair.STATIC, static.private_bytes_raw())
    noise.set_as_initiator()
    noise.start_handshake()
    await pipe.send(noise.write_message())
    noise.read_message(await pipe.message())
    signature = identity.sign(b"noise-libp2p-static-key:" + static.public_key().public_bytes_raw())
    key = b"\x08\x01\x12\x20" + identity.public_key().public_bytes_raw()  # PublicKey{Ed25519, 32 bytes}
    payload = NoiseHandshakePayload(identity_key=key, identity_sig=signature)
    await pipe.send(noise.write_message(payload.SerializeToString()))
    found = Stranger(stream, noise, base58.b58encode(b"\x00\x24" + key).decode())
    wish = negotiation(GREETING, "/yamux/1.0.0")
    await found.send(wish)
    while len(found._plain) < len(wish):
        assert await found._receive(), "the node left during the negotiation"
    assert found._plain[: len(wish)] == wish
    del found._plain[: len(wish)]
    return found


class _Plain:
    """The connection before it is secured."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self._stream.receive_some(size - len(data))
            assert more, "the node left during the handshake"
            data += more
        return data

    async def message(self) -> bytes:
        return await self.exactly(int.from_bytes(await self.exactly(2), "big"))

    async def send(self, message: bytes) -> None:
        await self._stream.send_all(len(message).to_bytes(2, "big") + message)
