"""multistream-select 1.0: two ends agree on a protocol, over anything that carries bytes.

The offering side sends its first wish together with the greeting instead of waiting for the other greeting,
so that agreeing on one protocol costs one round trip and not two; go-, rust- and py-libp2p answer that alike.
libp2p's own code reads byte by byte and accepts a message of any length.

Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

from lattica.errors import RemoteProtocolError, StreamError

GREETING = "/multistream/1.0.0"
REFUSAL = "na"
MAX_MESSAGE_BYTES = 1024  # go-multistream's bound; our longest protocol id has 32
READ_BYTES = 4096  # one read; what follows the negotiation is handed on
MAX_PROPOSALS = 32  # wishes that one stream may name before it is broken off


class Pipe(Protocol):
    """What a negotiation needs: bytes in, bytes out; empty bytes mean that the other side left."""

    async def send_all(self, data: bytes) -> None: ...

    async def receive_some(self, max_bytes: int) -> bytes | bytearray: ...


def encode(*messages: str) -> bytes:
    """Messages as they stand on the wire: length, text, line feed."""
    return b"".join(_encode_one(message.encode()) for message in messages)


def _encode_one(text: bytes) -> bytes:
    length = len(text) + 1
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a protocol name of {len(text)} bytes is longer than {MAX_MESSAGE_BYTES - 1}")
    prefix = bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])
    return prefix + text + b"\n"


class MessageReader:
    """Takes bytes as they come and gives whole messages; what follows them stays in `rest`."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def feed(self, data: bytes | bytearray) -> None:
        """Add bytes that arrived."""
        self.rest += data

    def next_message(self) -> str | None:
        """The next message, or None until more bytes have arrived.

        Raises:
            RemoteProtocolError: too long, not text, or without its line feed.
        """
        if not self.rest:
            return None
        length, start = self.rest[0], 1
        if length & 0x80:
            if len(self.rest) < 2:
                return None
            length, start = length & 0x7F | self.rest[1] << 7, 2
        if not 0 < length <= MAX_MESSAGE_BYTES:  # a third length byte would mean 16 KiB and more
            raise RemoteProtocolError(f"a multistream message of {length} bytes, at most {MAX_MESSAGE_BYTES}")
        if len(self.rest) < start + length:
            return None
        text = bytes(self.rest[start : start + length])
        del self.rest[: start + length]
        if text[-1:] != b"\n":
            raise RemoteProtocolError("a multistream message without its line feed")
        try:
            return text[:-1].decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError("a multistream message that is not UTF-8") from error


async def offer(pipe: Pipe, protocols: Sequence[str], *, then: bytes = b"") -> tuple[str | None, bytes]:
    """Ask for the first of `protocols` that the other side speaks.

    `then` follows the first proposal without waiting: what the first protocol begins with, when it is the only one.
    Returns the protocol, None when it speaks none of them, and the bytes that already followed the agreement.

    Raises:
        RemoteProtocolError: the other side doesn't speak multistream-select, or left.
    """
    reader = MessageReader()
    await pipe.send_all(encode(GREETING, protocols[0]) + then)
    await _expect_greeting(pipe, reader)
    for wish, following in zip(protocols, [*protocols[1:], None], strict=True):
        answer = await _message(pipe, reader)
        if answer == wish:
            return wish, bytes(reader.rest)
        if answer != REFUSAL:
            raise RemoteProtocolError(f"offered {wish}, answered {answer[:80]!r}")
        if following is not None:
            await pipe.send_all(encode(following))
    return None, b""


class LazyOffer:
    """One proposal whose answer nobody waits for: the data follows it at once.

    For a protocol that the other side is known to speak.
    """

    def __init__(self, protocol: str) -> None:
        self.proposal = encode(GREETING, protocol)
        self._protocol = protocol
        self._greeted = False
        self._reader = MessageReader()

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes that arrived; None until the answer is whole, then the bytes that follow it.

        Raises:
            StreamError: the other side does not speak the protocol after all.
            RemoteProtocolError: it does not speak multistream-select.
        """
        self._reader.feed(data)
        while (message := self._reader.next_message()) is not None:
            if not self._greeted:
                _check_greeting(message)
                self._greeted = True
            elif message == self._protocol:
                return bytes(self._reader.rest)
            elif message == REFUSAL:
                raise StreamError(f"does not speak {self._protocol}")
            else:
                raise RemoteProtocolError(f"offered {self._protocol}, answered {message[:80]!r}")
        return None


async def answer(pipe: Pipe, supported: Container[str]) -> tuple[str, bytes]:
    """Let the other side choose one of `supported`.

    Returns the protocol, and the bytes that already followed the agreement.

    Raises:
        RemoteProtocolError: it broke the protocol, left, or named only protocols that we don't speak.
    """
    reader = MessageReader()
    await pipe.send_all(encode(GREETING))
    await _expect_greeting(pipe, reader)
    for _ in range(MAX_PROPOSALS):
        wish = await _message(pipe, reader)
        if wish in supported:
            await pipe.send_all(encode(wish))
            return wish, bytes(reader.rest)
        await pipe.send_all(encode(REFUSAL))
    raise RemoteProtocolError(f"{MAX_PROPOSALS} protocols proposed, none of them known here")


async def _expect_greeting(pipe: Pipe, reader: MessageReader) -> None:
    _check_greeting(await _message(pipe, reader))


def _check_greeting(greeting: str) -> None:
    if greeting != GREETING:
        raise RemoteProtocolError(f"expected {GREETING}, got {greeting[:80]!r}")


async def _message(pipe: Pipe, reader: MessageReader) -> str:
    while (message := reader.next_message()) is None:
        data = await pipe.receive_some(READ_BYTES)
        if not data:
            raise RemoteProtocolError("the other side left during protocol negotiation")
        reader.feed(data)
    return message
