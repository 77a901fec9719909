"""What a handler raises becomes a Failure on the wire, and an exception of ours on the other side. No I/O."""

from __future__ import annotations

from typing import Any, Final, cast

from lattica.errors import (
    CallError,
    DeadlineError,
    LocalProtocolError,
    NoSuchMethodError,
    OverloadedError,
    RemoteError,
)
from lattica.protocols import MAX_ERROR_BYTES
from lattica.rpc.call import MAX_CODE_BYTES, Failure
from lattica.rpc.codec import encode

_MAX_RETRY_AFTER_SECONDS: Final = 3600.0  # what a peer tells us to wait is advice, not an order


def failure_of(error: BaseException) -> Failure:
    """The Failure that tells the caller of an exception; a group of one counts as that one.

    `error.details`, where an exception has it, travels too: a dict of plain values.
    """
    error = single(error)
    if isinstance(error, RemoteError):  # from a call of the handler's own: passed on as it came
        code, text, details = error.code, error.text, cast("object", error.details)
    else:
        code, text, details = type(error).__name__, str(error), getattr(error, "details", None)
    if isinstance(error, OverloadedError):
        details = {"retry_after": error.retry_after}
    return Failure(_bounded(code, MAX_CODE_BYTES), _bounded(text, MAX_ERROR_BYTES), _plain(details))


def single(error: BaseException) -> BaseException:
    """The one exception inside of groups of one, else the group itself."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def error_of(failure: Failure, *, method: str, peer: object) -> CallError:
    """The exception to raise where the call was made."""
    code, text, details = failure
    match code:
        case "DeadlineError":
            return DeadlineError(text, method=method, peer=peer)
        case "NoSuchMethodError":
            return NoSuchMethodError(text, method=method, peer=peer)
        case "OverloadedError":
            wait = details.get("retry_after")
            if not isinstance(wait, int | float) or not 0 <= wait <= _MAX_RETRY_AFTER_SECONDS:
                wait = 1.0
            return OverloadedError(text, retry_after=wait, method=method, peer=peer)
    return RemoteError(code, text, method=method, peer=peer, details=details)


def _bounded(text: str, limit_bytes: int) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode(errors="ignore") + "..."


def _plain(details: object) -> dict[str, Any]:
    """The details if they travel and are small, else none: an error about an error helps nobody."""
    if not isinstance(details, dict):
        return {}
    try:
        encode(details, max_bytes=MAX_ERROR_BYTES)
    except LocalProtocolError:
        return {}
    return details
