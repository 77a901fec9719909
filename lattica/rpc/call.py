"""The frames of a call, what they hold, and the order in which each side may send them. No I/O.

A call is one Request, items from the caller until its End (unless the Request says that none come), items
from the handler, and one outcome: End with the result, or Failure. Then the stream carries the next call.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica.protocols import MAX_ERROR_BYTES, MAX_FRAME_BYTES, MAX_METHOD_BYTES, MAX_TRACE_BYTES
from lattica.rpc.codec import Part, decode, encode
from lattica.rpc.framing import SKIPPED, Body, frame

_REQUEST, _ITEM, _END, _FAILURE = range(4)
MAX_CODE_BYTES: Final = 128  # a class name
_MORE: Final = b"\xc3"  # true, which ends the array of a Request that items follow


class Request(NamedTuple):
    """`timeout`: seconds that are left to the caller, None without a deadline; `more`: items follow."""

    method: str
    args: list[Any]
    timeout: float | None
    trace: str
    more: bool


class Item(NamedTuple):
    value: Any


class End(NamedTuple):
    """The last word of a side: from the handler with the result, from the caller with None."""

    value: Any


class Failure(NamedTuple):
    """The handler raised: class name, message, and plain values that the class carries."""

    code: str
    text: str
    details: dict[str, Any]


class Refused(NamedTuple):
    """A frame that was dropped unread: a Request, or an Item that nobody wants."""

    is_request: bool


Message = Request | Item | End | Failure


def pack(message: Message, *, max_bytes: int = MAX_FRAME_BYTES) -> list[Part]:
    """The frame of a message. Raises LocalProtocolError for values that do not travel, or are too large."""
    fields: list[Any]
    if isinstance(message, Request):
        if len(message.method) > MAX_METHOD_BYTES // 4:  # characters, of up to 4 bytes each
            _check_method(message.method)
        fields = [_REQUEST, *message]
    elif isinstance(message, Item):
        fields = [_ITEM, message.value]
    elif isinstance(message, End):
        fields = [_END, message.value]
    else:
        fields = [_FAILURE, *message]
    return frame(encode(fields, max_bytes=max_bytes))


def _check_method(method: str) -> None:
    if len(method.encode(errors="replace")) > MAX_METHOD_BYTES:
        raise LocalProtocolError(f"a method's name has at most {MAX_METHOD_BYTES} bytes: {method:.80}...")


def parse(body: Body) -> Message:
    """The message in a frame. Raises RemoteProtocolError and nothing else."""
    fields = decode(*body)
    if type(fields) is list and fields:
        kind, size = fields[0], len(fields)
        if type(kind) is int:
            if kind == _END and size == 2:
                return End(fields[1])
            if kind == _ITEM and size == 2:
                return Item(fields[1])
            if kind == _REQUEST and size == 6 and _is_request(*fields[1:]):
                return Request(*fields[1:])
            if kind == _FAILURE and size == 4 and _is_failure(*fields[1:]):
                return Failure(*fields[1:])
    raise RemoteProtocolError("a frame that is no request, item, end or failure")


def is_outcome(body: Body) -> bool:
    """Whether a frame claims to be an End or a Failure, by its first two bytes; `parse` decides."""
    return body[0][1:2] in (b"\x02", b"\x03")


def _is_request(method: object, args: object, timeout: object, trace: object, more: object) -> bool:
    return (
        type(method) is str
        and type(args) is list
        and type(trace) is str
        and type(more) is bool
        and (timeout is None or (type(timeout) in (float, int) and 0 <= timeout < math.inf))  # type: ignore[operator]
        # Characters have up to 4 bytes; the exact count is only asked for where it may matter.
        and (len(method) * 4 <= MAX_METHOD_BYTES or len(method.encode()) <= MAX_METHOD_BYTES)
        and (len(trace) * 4 <= MAX_TRACE_BYTES or len(trace.encode()) <= MAX_TRACE_BYTES)
    )


def _is_failure(code: object, text: object, details: object) -> bool:
    return (
        type(code) is str
        and type(text) is str
        and type(details) is dict
        and len(code.encode()) <= MAX_CODE_BYTES
        and len(text.encode()) <= MAX_ERROR_BYTES
    )


class ClientCall:
    """One call as its caller sees it: what may be sent now, what may arrive now."""

    __slots__ = ("is_sending", "is_started", "outcome")

    def __init__(self) -> None:
        self.is_started = False
        self.is_sending = False  # items of ours may still follow
        self.outcome: End | Failure | None = None

    @property
    def is_clean(self) -> bool:
        """Whether the stream is between calls, so that it may carry another one."""
        return not self.is_started or (self.outcome is not None and not self.is_sending)

    def request(self, request: Request, *, max_bytes: int = MAX_FRAME_BYTES) -> list[Part]:
        parts = pack(request, max_bytes=max_bytes)
        self.is_started, self.is_sending = True, request.more
        return parts

    def item(self, value: object, *, max_bytes: int = MAX_FRAME_BYTES) -> list[Part]:
        if not self.is_sending:
            raise LocalProtocolError("send() after finish()")
        return pack(Item(value), max_bytes=max_bytes)

    def end(self) -> list[Part]:
        """Our last word; nothing when it is said already."""
        parts = pack(End(None)) if self.is_sending else []
        self.is_sending = False
        return parts

    def receive(self, body: Body) -> Item | End | Failure:
        """What a frame from the handler's side means."""
        message = parse(body)
        if self.outcome is not None or isinstance(message, Request):
            raise RemoteProtocolError(f"a {type(message).__name__} frame where none may be")
        if not isinstance(message, Item):
            self.outcome = message
        return message


class ServerCalls:
    """The calls on one inbound stream, one after the other, as the handlers' side sees them."""

    __slots__ = ("has_more", "is_open")

    def __init__(self) -> None:
        self.is_open = False  # a request is being worked on
        self.has_more = False  # the caller has not said its End

    def receive(self, body: Body) -> Request | Item | End | Refused:
        """What a frame from the caller means."""
        if body[1] is SKIPPED:
            return self._skipped(body[0])
        message = parse(body)
        if isinstance(message, Request):
            if not self.is_open and not self.has_more:
                self.is_open, self.has_more = True, message.more
                return message
        elif self.has_more:
            if isinstance(message, Item):
                return message
            if isinstance(message, End) and message.value is None:
                self.has_more = False
                return message
        raise RemoteProtocolError(f"a {type(message).__name__} frame where none may be")

    def outcome(self, message: End | Failure, *, max_bytes: int = MAX_FRAME_BYTES) -> list[Part]:
        parts = pack(message, max_bytes=max_bytes)
        self.is_open = False
        return parts

    def _skipped(self, array: bytes) -> Refused:
        """A frame of which only the first two bytes and the last are known."""
        if array[:2] == b"\x96\x00" and not self.is_open and not self.has_more:
            self.is_open, self.has_more = True, array[2:] == _MORE
            return Refused(is_request=True)
        if array[:2] == b"\x92\x01" and self.has_more:
            return Refused(is_request=False)
        raise RemoteProtocolError("a large frame that is no request or item, or not where it may be")
