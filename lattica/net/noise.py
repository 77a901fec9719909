"""The Noise XX handshake and its records, over bytes. Opens no socket and reads no clock.

`NoiseHandshake` proves who is at the other end, `NoiseSession` encrypts and decrypts afterwards: every record
that has arrived at once, everything that waits to be sent in one go. The handshake's state machine is the
`noiseprotocol` library's, which libp2p uses too; the records go straight to ChaCha20-Poly1305 of
`cryptography`, because the library checks and formats each nonce in Python.

Source: https://github.com/libp2p/specs/blob/master/noise/README.md (Noise_XX_25519_ChaChaPoly_SHA256).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.peer.id import ID
from libp2p.security.noise.pb.noise_pb2 import NoiseHandshakePayload
from noise.connection import Keypair, NoiseConnection

from lattica.errors import RemoteProtocolError
from lattica.ids import PeerId
from lattica.net.identity import Identity

PROTOCOL = "/noise"
MAX_RECORD_BYTES = 65_535  # two length bytes; ciphertext and tag
TAG_BYTES = 16
MAX_PLAINTEXT_BYTES = MAX_RECORD_BYTES - TAG_BYTES
MAX_HANDSHAKE_BYTES = 8_192  # an RSA-4096 identity with extensions stays under 2 KiB; go sends up to 4 KiB
_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNED_PREFIX = b"noise-libp2p-static-key:"


@dataclass(frozen=True, slots=True)
class Secured:
    """What a finished handshake gives: who is there, the keys of both directions, and bytes read behind it."""

    peer: PeerId
    send_key: bytes
    receive_key: bytes
    early: bytes


class NoiseHandshake:
    """One side of the handshake. Feed it bytes, send what it gives, until `result` is there.

    Args:
        identity: who we are.
        initiator: whether we dialled.
        expected: who must be at the other end; None accepts everybody, and proves who it is.
    """

    def __init__(self, identity: Identity, *, initiator: bool, expected: PeerId | None = None) -> None:
        self.result: Secured | None = None
        self._identity = identity
        self._expected = expected
        self._initiator = initiator
        self._static = X25519PrivateKey.generate()
        self._state = NoiseConnection.from_name(_NAME)
        self._state.set_keypair_from_private_bytes(Keypair.STATIC, self._static.private_bytes_raw())
        if initiator:
            self._state.set_as_initiator()
        else:
            self._state.set_as_responder()
        self._state.start_handshake()
        self._keys = self._state.noise_protocol.handshake_state  # the library drops it when it is done
        self._buffer = bytearray()
        self._messages_read = 0

    def start(self) -> bytes:
        """The first bytes to send; none for the side that was dialled."""
        return self._write(b"") if self._initiator else b""

    def receive(self, data: bytes) -> bytes:
        """Take bytes that arrived; returns the bytes to send, possibly none.

        Bytes behind the handshake are kept for the session: `result.early`.

        Raises:
            RemoteProtocolError: the other side broke the handshake, or is not the expected peer.
        """
        self._buffer += data
        reply = b""
        while self.result is None and (message := self._next_message()) is not None:
            try:
                reply += self._take(message)
            except RemoteProtocolError:
                raise
            except Exception as error:  # what noiseprotocol passes on from cryptography, or its own checks
                raise RemoteProtocolError("the noise handshake failed: not a valid message") from error
        return reply

    def _next_message(self) -> bytes | None:
        if len(self._buffer) < 2:
            return None
        length = int.from_bytes(self._buffer[:2], "big")
        if length > MAX_HANDSHAKE_BYTES:
            raise RemoteProtocolError(
                f"a noise handshake message of {length} bytes, at most {MAX_HANDSHAKE_BYTES} allowed"
            )
        if len(self._buffer) < 2 + length:
            return None
        message = bytes(self._buffer[2 : 2 + length])
        del self._buffer[: 2 + length]
        return message

    def _take(self, message: bytes) -> bytes:
        payload = bytes(self._state.read_message(message))
        self._messages_read += 1
        if self._initiator:  # read: e, ee, s, es; write: s, se
            peer = self._check(payload)
            reply = self._write(self._payload())
            self._finish(peer)
            return reply
        if self._messages_read == 1:  # read: e; write: e, ee, s, es
            return self._write(self._payload())
        self._finish(self._check(payload))  # read: s, se
        return b""

    def _write(self, payload: bytes) -> bytes:
        message = bytes(self._state.write_message(payload))
        return len(message).to_bytes(2, "big") + message

    def _payload(self) -> bytes:
        static = self._static.public_key().public_bytes_raw()
        return NoiseHandshakePayload(
            identity_key=self._identity.peer_id.multihash[2:],  # an Ed25519 id is the key behind 2 bytes
            identity_sig=self._identity.sign(_SIGNED_PREFIX + static),
        ).SerializeToString()

    def _check(self, raw: bytes) -> PeerId:
        """Who signed the static key of this handshake."""
        static = self._keys.rs.public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        try:
            payload = NoiseHandshakePayload.FromString(raw)
            key = deserialize_public_key(payload.identity_key)
            signed = key.verify(_SIGNED_PREFIX + static, payload.identity_sig)
            peer = PeerId.from_bytes(ID.from_pubkey(key).to_bytes())
        except Exception as error:  # each of libp2p's key kinds raises its own errors
            raise RemoteProtocolError("the noise handshake failed: no valid identity") from error
        if not signed:
            raise RemoteProtocolError(f"the noise handshake failed: {peer} did not sign its static key")
        if self._expected is not None and peer != self._expected:
            raise RemoteProtocolError(f"expected peer {self._expected}, but {peer} answered", peer=peer)
        return peer

    def _finish(self, peer: PeerId) -> None:
        protocol = self._state.noise_protocol
        self.result = Secured(
            peer,
            send_key=protocol.cipher_state_encrypt.k,
            receive_key=protocol.cipher_state_decrypt.k,
            early=bytes(self._buffer),
        )


class NoiseSession:
    """Records of an established session. Each key is 32 bytes; nonces count up from zero."""

    def __init__(self, *, send_key: bytes, receive_key: bytes) -> None:
        self._send = ChaCha20Poly1305(send_key)
        self._receive = ChaCha20Poly1305(receive_key)
        self._sent = 0  # records: 2^64 of them can't be sent in a lifetime
        self._received = 0
        self._buffer = bytearray()

    def encrypt(self, pieces: Iterable[bytes | bytearray | memoryview]) -> bytes:
        """The records that carry these pieces, one after the other, in as few records as fit."""
        records: list[bytes] = []
        for plain in _packed(pieces):
            sealed = self._send.encrypt(_nonce(self._sent), plain, None)
            self._sent += 1
            records.append(len(sealed).to_bytes(2, "big"))
            records.append(sealed)
        return b"".join(records)

    def receive(self, data: bytes) -> list[bytes]:
        """As `each`, all of them."""
        return list(self.each(data))

    def each(self, data: bytes) -> Iterator[bytes]:
        """The plaintext of each record that is whole by now. Keeps less than one record, once it ran to its end.

        Raises:
            RemoteProtocolError: a record is too short for its tag, or was not sealed by the other side.
        """
        self._buffer += data
        start, end = 0, len(self._buffer)
        with memoryview(self._buffer) as view:
            while end - start >= 2:
                length = view[start] << 8 | view[start + 1]
                if length < TAG_BYTES:
                    raise RemoteProtocolError(f"a noise record of {length} bytes is shorter than its tag")
                if end - start - 2 < length:
                    break
                try:
                    plain = self._receive.decrypt(
                        _nonce(self._received), view[start + 2 : start + 2 + length], None
                    )
                except InvalidTag as error:
                    raise RemoteProtocolError("a noise record that the other side did not seal") from error
                self._received += 1
                start += 2 + length
                if plain:
                    yield plain
        del self._buffer[:start]


def _nonce(counter: int) -> bytes:
    return b"\0\0\0\0" + counter.to_bytes(8, "little")  # Noise specification, section 12.3


def _packed(pieces: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in chunks of at most one record each: small pieces joined, large ones cut."""
    batch: list[bytes | bytearray | memoryview] = []
    size = 0
    for piece in pieces:
        rest = memoryview(piece)
        while size + len(rest) > MAX_PLAINTEXT_BYTES:
            room = MAX_PLAINTEXT_BYTES - size
            batch.append(rest[:room])
            yield b"".join(batch) if len(batch) > 1 else rest[:room]
            rest, batch, size = rest[room:], [], 0
        if rest:
            batch.append(rest)
            size += len(rest)
    if batch:
        yield b"".join(batch)
