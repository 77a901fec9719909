"""Every error that leaves this package.

LatticaError
├── ConfigError
├── ProtocolError ── LocalProtocolError · RemoteProtocolError (.peer)
├── NetworkError ── DialError (.attempts) · UnreachableError · StreamError
├── CallError (.method .peer) ── DeadlineError · OverloadedError (.retry_after)
│                                · NoSuchMethodError · RemoteError (.code .text)
├── BlobError ── NotFoundError · HashError (.cid .chunk .peer)
├── RecordError · DocumentError
└── InferenceError ── (its branches live in `lattica_infer.errors`)

A message is one sentence: what, which value, what to try. Foreign errors become ours in one place per
library. Bytes from a peer can raise `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence


class LatticaError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(LatticaError):
    """A setting, file or folder that we were told to use cannot be used."""


class ProtocolError(LatticaError):
    """Bytes or calls that a protocol does not allow."""


class LocalProtocolError(ProtocolError):
    """Our caller asked for something that the protocol does not allow: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """A peer sent bytes that the protocol does not allow; its stream is reset."""

    def __init__(self, message: str, *, peer: object = None) -> None:
        super().__init__(message)
        self.peer = peer


class NetworkError(LatticaError):
    """The network failed us, not the other side's program."""


class DialError(NetworkError):
    """No address of a peer answered. `attempts` holds (address, reason) pairs."""

    def __init__(self, message: str, *, attempts: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.attempts = tuple(attempts)


class UnreachableError(NetworkError):
    """We know no way to a peer: no address, no connection."""


class StreamError(NetworkError):
    """A stream was reset, or its connection was lost."""


class CallError(LatticaError):
    """A remote call failed. `method` and `peer` say which."""

    def __init__(self, message: str, *, method: str | None = None, peer: object = None) -> None:
        super().__init__(message)
        self.method = method
        self.peer = peer


class DeadlineError(CallError):
    """A call did not finish within its deadline; its handler is cancelled."""


class OverloadedError(CallError):
    """The other side has no room for this call now; try again after `retry_after` seconds."""

    def __init__(
        self, message: str, *, retry_after: float = 1.0, method: str | None = None, peer: object = None
    ) -> None:
        super().__init__(message, method=method, peer=peer)
        self.retry_after = retry_after


class NoSuchMethodError(CallError):
    """The other side serves no such method."""


class RemoteError(CallError):
    """The handler on the other side raised. `code` is its exception's class name, `text` its message.

    `details` holds what its exception carried in an attribute of that name: plain values.
    """

    def __init__(
        self,
        code: str,
        text: str,
        *,
        method: str | None = None,
        peer: object = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{code}: {text}" if text else code, method=method, peer=peer)
        self.code = code
        self.text = text
        self.details = dict(details or {})


class BlobError(LatticaError):
    """Content could not be stored or read."""


class NotFoundError(BlobError):
    """Nobody we asked has this content."""


class HashError(BlobError):
    """Content does not match its hash."""

    def __init__(
        self, message: str, *, cid: object = None, chunk: int | None = None, peer: object = None
    ) -> None:
        super().__init__(message)
        self.cid = cid
        self.chunk = chunk
        self.peer = peer


class RecordError(LatticaError):
    """A record is forged, stale, oversize, or could not be stored."""


class DocumentError(LatticaError):
    """A document refuses a change."""


class InferenceError(LatticaError):
    """Base of what `lattica_infer` raises."""


@contextlib.contextmanager
def single_error() -> Iterator[None]:
    """Let a lone error out of a block as itself, not inside the groups that the nurseries on its way made."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, BaseExceptionGroup):
            raise
        raise error from error.__cause__
