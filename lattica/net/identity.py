"""The key that a node is known by: an Ed25519 private key and the file that it lives in.

The file is PKCS#8 in PEM, unencrypted ("BEGIN PRIVATE KEY", RFC 5958 and RFC 8410), mode 0600: `openssl pkey`
reads it. Knows nothing of libp2p, so that the command line can name a node without importing it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from lattica.errors import ConfigError
from lattica.ids import PeerId

_MAX_FILE_BYTES = 4096  # the PEM of an Ed25519 key has 119; nobody's key file is larger than this


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 private key (`private_bytes`: its 32-byte seed) and the PeerId that follows from it."""

    private_bytes: bytes = field(repr=False)
    peer_id: PeerId = field(init=False)
    _key: Ed25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = Ed25519PrivateKey.from_private_bytes(self.private_bytes)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "peer_id", PeerId.from_public_key(key.public_key().public_bytes_raw()))

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the system's randomness."""
        return cls(secrets.token_bytes(32))

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`, 64 bytes."""
        return self._key.sign(data)


def verify(peer_id: PeerId, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` was made with the key of `peer_id`.

    False, too, for a peer id that doesn't hold an Ed25519 key.
    """
    public = peer_id.public_key
    if public is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_or_create(path: str | os.PathLike[str]) -> Identity:
    """The identity in the key file at `path`; the file is created, with its folders, where there is none.

    Of several processes that create it at once one wins, and all return its key. An existing file is never
    written to.

    Raises:
        ConfigError: the file cannot be read or written, is open to other users, or holds no Ed25519 key.
    """
    file = Path(path).expanduser()
    try:
        return load(file)
    except FileNotFoundError:
        pass
    identity = Identity.generate()
    try:
        _create(file, identity)
    except FileExistsError:  # another process was faster
        return load(file)
    except OSError as error:
        raise ConfigError(
            f"cannot create the key file {file}: {error.strerror}; name a data folder that you may write"
        ) from error
    return identity


def load(path: str | os.PathLike[str]) -> Identity:
    """The identity in the key file at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be read, is open to other users, or holds no Ed25519 key.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            pem = stream.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(
            f"cannot read the key file {file}: {error.strerror}; make it readable or name another data folder"
        ) from error
    if mode & 0o077:
        raise ConfigError(
            f"the key file {file} is open to other users (mode {mode:04o}); run `chmod 600 {file}`"
        )
    try:
        if len(pem) > _MAX_FILE_BYTES:
            raise ValueError("too large")
        key = load_pem_private_key(pem, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("another kind of key")
    except Exception as error:  # cryptography documents three kinds here, and its Rust core raises more
        raise ConfigError(
            f"the key file {file} holds no Ed25519 private key in PKCS#8 PEM; restore it from a copy, "
            "or move it away to get a new peer id"
        ) from error
    return Identity(key.private_bytes_raw())


def _create(file: Path, identity: Identity) -> None:
    """Write the key file whole or not at all. FileExistsError when somebody else did first."""
    pem = identity._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(draft, file)  # unlike rename, fails when the name is taken
        _sync_folder(file.parent)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
