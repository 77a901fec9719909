"""One stream that calls arrive on: whose it is, what it holds, and what its caller sends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import trio

from lattica.errors import RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.rpc.call import End, Item, Refused, Request, ServerCalls
from lattica.rpc.channel import Channel
from lattica.rpc.codec import Part
from lattica.rpc.framing import size_of
from lattica.rpc.limits import Limits, Load
from lattica.rpc.methods import Call
from lattica.rpc.metrics import MethodStats


class Inbound:
    """The state of one inbound stream. Its calls run in the task that serves it, one after the other."""

    __slots__ = (
        "_arguments",
        "_items",
        "calls",
        "channel",
        "fault",
        "frame_bytes",
        "is_expired",
        "is_left",
        "load",
        "peer",
        "running",
        "scope",
        "stats",
    )

    def __init__(self, stream: Stream, limits: Limits, load: Load) -> None:
        self.peer: PeerId | None = stream.peer
        self.load = load
        self.calls = ServerCalls()
        self.channel = Channel(stream, max_frame_bytes=limits.max_argument_bytes, on_large=self._wants)
        self.scope: trio.CancelScope | None = None
        self.running: Call | None = None  # until its outcome is sent
        self.stats: MethodStats | None = None
        self.frame_bytes = 0  # of the latest frame
        self.fault: RemoteProtocolError | None = None  # what the caller sent while a handler read its items
        self.is_left = False  # the caller has reset the stream, or is lost
        self.is_expired = False  # the running call was cancelled by its deadline
        self._arguments = 0  # bytes that the running call's arguments hold of the peer's budget
        self._items = 0  # bytes that an item under way holds
        stream.on_break(self._leave)

    async def take(self) -> Request | Item | End | Refused | None:
        """The next message from the caller, None at the stream's end."""
        body = await self.channel.take()
        if self._items:
            self.load.items.give(self._items)
            self._items = 0
        if body is None:
            return None
        self.frame_bytes = size_of(body)
        return self.calls.receive(body)

    async def send(self, parts: list[Part]) -> None:
        """Send one frame. Raises StreamError."""
        if self.stats is not None:
            self.stats.sent_bytes += sum(map(len, parts))
        await self.channel.send(parts)

    async def _wants(self, size_bytes: int) -> bool:
        """Whether a large frame may have memory. Items wait until others' are taken, arguments don't."""
        calls = self.calls
        if not calls.has_more:  # it should be a request
            if not self.load.arguments.take(size_bytes):
                return False
            self._arguments = size_bytes
            return True
        if not calls.is_open:  # nobody will read what is left over of the last call
            return False
        await self.load.items.wait_and_take(size_bytes)
        self._items = size_bytes
        return True

    def release(self) -> None:
        """A call is over: its arguments may go."""
        if self._arguments:
            self.load.arguments.give(self._arguments)
            self._arguments = 0

    def close(self) -> None:
        """The stream is over."""
        self.release()
        if self._items:
            self.load.items.give(self._items)
            self._items = 0

    @property
    def is_gone(self) -> bool:
        """Whether nobody listens any more."""
        return self.is_left or self.channel.is_broken

    def expire(self) -> None:
        """The running call's deadline has passed."""
        if self.running is not None and self.scope is not None:
            self.is_expired = True
            self.scope.cancel()

    def _leave(self) -> None:
        self.is_left = True
        if self.scope is not None:
            self.scope.cancel()


class Items:
    """The caller's items, read from the stream only as the handler asks for them."""

    __slots__ = ("_inbound", "_is_over")

    def __init__(self, inbound: Inbound) -> None:
        self._inbound = inbound
        self._is_over = False

    def __aiter__(self) -> Items:
        return self

    async def __anext__(self) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        inbound = self._inbound
        if self._is_over or not inbound.calls.has_more:
            raise StopAsyncIteration
        try:
            message = await inbound.take()
        except RemoteProtocolError as error:
            inbound.fault = error
            raise
        if isinstance(message, Item):
            if inbound.stats is not None:
                inbound.stats.received_bytes += inbound.frame_bytes
            await inbound.channel.take_turn()
            return message.value
        if message is None:
            raise StreamError("the caller ended its stream in the middle of the call")
        raise StopAsyncIteration

    def close(self) -> None:
        """The call is over: what a task that it left behind asks for is not its own any more."""
        self._is_over = True


class _NoItems:
    """What a caller that sends none sends."""

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        raise StopAsyncIteration

    def close(self) -> None:
        """Nothing: there was nothing to come."""


NO_ITEMS: Final = _NoItems()
