"""The frames of a call, what they hold, and the order in which each side may send them. No I/O.

A call is one Request, items from the caller until its End (unless the Request says that none come), items
from the handler, and one outcome: End with the result, or Failure. Then the stream carries the next call.
A Probe says nothing: its sender learns by it whether the stream still lives.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from lattica.errors import LocalProtocolError, RemoteProtocolError
from lattica.protocols import MAX_ERROR_BYTES, MAX_METHOD_BYTES, MAX_TRACE_BYTES
from lattica.rpc.codec import Part, decode, encode
from lattica.rpc.framing import Body, frame

_REQUEST, _ITEM, _END, _FAILURE, _PROBE = range(5)
MAX_CODE_BYTES: Final = 128  # a class name


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


class Probe(NamedTuple):
    """Nothing."""


Message = Request | Item | End | Failure | Probe


def pack(message: Message) -> list[Part]:
    """The frame of a message. Raises LocalProtocolError for values that do not travel."""
    match message:
        case Request(method, args, timeout, trace, more):
            if len(method.encode(errors="replace")) > MAX_METHOD_BYTES:
                raise LocalProtocolError(
                    f"a method's name has at most {MAX_METHOD_BYTES} bytes: {method:.80}..."
                )
            fields = [_REQUEST, method, args, timeout, trace, more]
        case Item(value):
            fields = [_ITEM, value]
        case End(value):
            fields = [_END, value]
        case Failure(code, text, details):
            fields = [_FAILURE, code, text, details]
        case Probe():
            fields = [_PROBE]
    return frame(encode(fields))


def parse(body: Body) -> Message:
    """The message in a frame. Raises RemoteProtocolError and nothing else."""
    match decode(*body):
        case [0, str(method), list(args), timeout, str(trace), bool(more)] if _is_request(
            method, timeout, trace
        ):
            return Request(method, args, timeout, trace, more)
        case [1, value]:
            return Item(value)
        case [2, value]:
            return End(value)
        case [3, str(code), str(text), dict(details)] if _is_failure(code, text):
            return Failure(code, text, details)
        case [4]:
            return Probe()
    raise RemoteProtocolError("a frame that is no request, item, end, failure or probe")


def is_outcome(body: Body) -> bool:
    """Whether a frame claims to be an End or a Failure, by its first two bytes; `parse` decides."""
    return body[0][1:2] in (b"\x02", b"\x03")


def _is_request(method: str, timeout: object, trace: str) -> bool:
    fits = len(method.encode()) <= MAX_METHOD_BYTES and len(trace.encode()) <= MAX_TRACE_BYTES
    return fits and (timeout is None or (type(timeout) in (int, float) and 0 <= timeout < math.inf))  # type: ignore[operator]


def _is_failure(code: str, text: str) -> bool:
    return len(code.encode()) <= MAX_CODE_BYTES and len(text.encode()) <= MAX_ERROR_BYTES


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

    def request(self, request: Request) -> list[Part]:
        parts = pack(request)
        self.is_started, self.is_sending = True, request.more
        return parts

    def item(self, value: object) -> list[Part]:
        if not self.is_sending:
            raise LocalProtocolError("send() after finish()")
        return pack(Item(value))

    def end(self) -> list[Part]:
        """Our last word; nothing when it is said already."""
        parts = pack(End(None)) if self.is_sending else []
        self.is_sending = False
        return parts

    def receive(self, body: Body) -> Item | End | Failure | None:
        """What a frame from the handler's side means; None for a probe."""
        message = parse(body)
        if self.outcome is not None or isinstance(message, Request):
            raise RemoteProtocolError(f"a {type(message).__name__} frame where none may be")
        if isinstance(message, Probe):
            return None
        if not isinstance(message, Item):
            self.outcome = message
        return message


class ServerCalls:
    """The calls on one inbound stream, one after the other, as the handlers' side sees them."""

    __slots__ = ("has_more", "is_open")

    def __init__(self) -> None:
        self.is_open = False  # a request is being worked on
        self.has_more = False  # the caller has not said its End

    def receive(self, body: Body) -> Request | Item | End | None:
        """What a frame from the caller means; None for a probe."""
        message = parse(body)
        match message:
            case Probe():
                return None
            case Request() if not self.is_open and not self.has_more:
                self.is_open, self.has_more = True, message.more
                return message
            case Item() if self.has_more:
                return message
            case End(None) if self.has_more:
                self.has_more = False
                return message
        raise RemoteProtocolError(f"a {type(message).__name__} frame where none may be")

    def outcome(self, message: End | Failure) -> list[Part]:
        parts = pack(message)
        self.is_open = False
        return parts
