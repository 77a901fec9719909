"""PeerId and Cid: the two names of the mesh. Parse, format, compare; no I/O.

A PeerId is the multihash of a public key (libp2p peer-ids specification); ours are Ed25519, whose key is
short enough to stand in the id itself (identity multihash), so that a signature can be checked with the id
alone. A Cid is CIDv1, codec raw, hash BLAKE3-256 (multiformats/cid).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import base58
from blake3 import blake3

# identity multihash of 36 bytes: protobuf PublicKey { type: Ed25519, data: 32 bytes }
_ED25519_PREFIX = bytes.fromhex("002408011220")
_CID_PREFIX = bytes.fromhex("01551e20")  # version 1, codec raw, BLAKE3, 32 bytes
_MAX_PEER_ID_BYTES = 64


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """The name of a peer: its public key's multihash. `str()` gives base58btc, as in `/p2p/12D3Koo...`."""

    multihash: bytes

    @classmethod
    def parse(cls, text: str | PeerId) -> PeerId:
        """Read a base58btc peer id; a PeerId passes through.

        Raises:
            ValueError: the text is not a peer id.
        """
        if isinstance(text, PeerId):
            return text
        try:
            raw = base58.b58decode(text) if len(text) <= 2 * _MAX_PEER_ID_BYTES else b""
        except ValueError as error:
            raise ValueError(f"not a peer id: {text!r}") from error
        return cls.from_bytes(raw)

    @classmethod
    def from_bytes(cls, raw: bytes) -> PeerId:
        """Read the binary form (a multihash). Raises ValueError."""
        known_hash = raw[:2] in (b"\x12\x20", b"\x00\x24", b"\x00\x25")
        if not known_hash or len(raw) != 2 + raw[1]:
            raise ValueError(f"not a peer id: {raw[:40]!r}")
        return cls(bytes(raw))

    @classmethod
    def from_public_key(cls, key: bytes) -> PeerId:
        """The id of a raw Ed25519 public key, 32 bytes."""
        if len(key) != 32:
            raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(key)}")
        return cls(_ED25519_PREFIX + key)

    @property
    def public_key(self) -> bytes | None:
        """The raw Ed25519 public key inside the id, 32 bytes; None for ids of other key kinds."""
        return self.multihash[6:] if self.multihash.startswith(_ED25519_PREFIX) else None

    def __str__(self) -> str:
        return base58.b58encode(self.multihash).decode()

    def __repr__(self) -> str:
        return f"PeerId({self})"


@dataclass(frozen=True, slots=True, order=True)
class Cid:
    """The name of content: its BLAKE3-256 hash, as CIDv1. `str()` gives base32, `bafkr4i...`."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != 32:
            raise ValueError(f"a BLAKE3-256 digest has 32 bytes, not {len(self.digest)}")

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Cid:
        """The Cid of some bytes."""
        return cls(blake3(data).digest())

    @classmethod
    def parse(cls, text: str | Cid) -> Cid:
        """Read a CIDv1 in base32; a Cid passes through.

        Raises:
            ValueError: the text is not a CIDv1 of codec raw and hash BLAKE3-256.
        """
        if isinstance(text, Cid):
            return text
        body = text[1:].upper() if text[:1] == "b" and text == text.lower() else ""
        try:
            raw = base64.b32decode(body + "=" * (-len(body) % 8)) if len(text) == 59 else b""
        except ValueError as error:
            raise ValueError(f"not a Cid: {text!r}") from error
        if not raw.startswith(_CID_PREFIX) or len(raw) != 36:
            raise ValueError(f"not a Cid (CIDv1, raw, BLAKE3-256): {text[:80]!r}")
        cid = cls(raw[4:])
        if str(cid) != text:  # spare bits of the last base32 letter must be zero: one name per content
            raise ValueError(f"not a Cid in its one spelling: {text!r}")
        return cid

    def __str__(self) -> str:
        return "b" + base64.b32encode(_CID_PREFIX + self.digest).decode().rstrip("=").lower()

    def __repr__(self) -> str:
        return f"Cid({self})"
