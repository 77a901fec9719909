"""The caller's side of a call: one that answers with one value, and the stream that a program holds."""

from __future__ import annotations

import contextlib
from typing import Any

import trio

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.rpc.call import ClientCall, End, Failure, Item, Request, is_outcome
from lattica.rpc.channel import Channel, blame
from lattica.rpc.codec import Part
from lattica.rpc.failures import error_of
from lattica.rpc.framing import Body, size_of
from lattica.rpc.limits import Limits
from lattica.rpc.metrics import MethodStats


class ClientStream:
    """A call with items in either direction, made by `Rpc.stream`.

    Iterate it for the handler's items, `send` items to it, `finish` to say that those were all, `result` for
    what the handler returned. One task may iterate while another sends.
    """

    def __init__(
        self,
        channel: Channel,
        call: ClientCall,
        *,
        method: str,
        peer: PeerId,
        limits: Limits,
        stats: MethodStats,
    ) -> None:
        self.method = method
        self.peer = peer
        self._channel = channel
        self._call = call
        self._limits = limits
        self._stats = stats

    def __aiter__(self) -> ClientStream:
        return self

    async def __anext__(self) -> Any:
        """The handler's next item. Raises what the handler raised, after the items before it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        message = await self._next()
        if isinstance(message, Item):
            return message.value
        self._raise(message)
        raise StopAsyncIteration

    async def send(self, item: object) -> None:
        """Send an item; waits while the handler's side has no room for it.

        Returns at once when the handler has returned without reading all items: `result` tells what it
        returned. Raises what the handler raised, if it did, StreamError, and LocalProtocolError for an item that
        does not travel or is over `max_argument_bytes`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._is_over():
            self._raise(self._call.outcome)
            return
        await self._send(self._call.item(item, max_bytes=self._limits.max_argument_bytes))

    async def finish(self) -> None:
        """Say that no more items come. More than once does nothing."""
        if not self._is_over():
            await self._send(self._call.end())

    async def result(self) -> Any:
        """What the handler returns, None for a generator. Says `finish` first; drops items not yet read."""
        await self.finish()
        while isinstance(message := await self._next(), Item):
            await trio.lowlevel.checkpoint_if_cancelled()
        if isinstance(message, End):
            return message.value
        raise error_of(message, method=self.method, peer=self.peer)

    def abort(self) -> None:
        """Break the call off at once; its handler is cancelled."""
        self._channel.reset()

    async def leave(self) -> None:
        """Say our last word too if the handler has said its own: then the stream may carry another call."""
        if self._is_over() and not self._channel.is_broken and (parts := self._call.end()):
            with contextlib.suppress(StreamError):  # the call is over: only the stream is lost
                await self._channel.send(parts)

    async def _next(self) -> Item | End | Failure:
        if self._call.outcome is not None:
            return self._call.outcome
        try:
            body = await self._channel.take()
            if body is not None:
                message = self._receive(body)
                await self._channel.take_turn()
                return message
        except RemoteProtocolError as error:
            raise blame(error, self.peer) from None
        except StreamError as error:
            raise self._lost(error) from error
        raise self._lost("the stream ended in the middle of the call")

    def _receive(self, body: Body) -> Item | End | Failure:
        self._stats.received_bytes += size_of(body)
        return self._call.receive(body)

    async def _send(self, parts: list[Part]) -> None:
        # A handler that ends early is no reason to break off: its side drops what still comes, so a send that
        # waits for room ends soon, and the stream stays whole for the next call.
        if parts:
            self._stats.sent_bytes += sum(map(len, parts))
            try:
                await self._channel.send(parts)
            except StreamError as error:
                raise self._lost(error) from error

    def _is_over(self) -> bool:
        """Whether the outcome is here: read already, or next in line."""
        if self._call.outcome is None:
            body = self._channel.head()
            if body is None or not is_outcome(body):
                return False
            taken = self._channel.take_nowait()
            assert taken is not None
            try:
                self._receive(taken)
            except RemoteProtocolError as error:
                raise blame(error, self.peer) from None
        return True

    def _raise(self, outcome: End | Failure | None) -> None:
        if isinstance(outcome, Failure):
            raise error_of(outcome, method=self.method, peer=self.peer)

    def _lost(self, why: object) -> StreamError:
        return StreamError(f"{self.method} on {self.peer}: {why}")


async def begin(
    channel: Channel, call: ClientCall, request: Request, peer: PeerId, limits: Limits, stats: MethodStats
) -> None:
    """Send a request.

    Raises:
        LocalProtocolError: an argument does not travel, or they are too large; nothing is sent.
        StreamError: the stream is lost.
    """
    parts = call.request(request, max_bytes=limits.max_argument_bytes)
    stats.sent_bytes += sum(map(len, parts))
    try:
        if not channel.send_now(parts):
            await channel.send(parts)
    except StreamError as error:
        raise StreamError(f"{request.method} on {peer}: {error}") from error


async def call_once(
    channel: Channel, call: ClientCall, request: Request, peer: PeerId, limits: Limits, stats: MethodStats
) -> Any:
    """Make a unary call over a stream that is between calls; its result."""
    method = request.method
    await begin(channel, call, request, peer, limits, stats)
    try:
        body = await channel.take()
        if body is None:
            raise StreamError("the stream ended in the middle of the call")
        stats.received_bytes += size_of(body)
        message = call.receive(body)
    except RemoteProtocolError as error:
        raise blame(error, peer) from None
    except StreamError as error:
        raise StreamError(f"{method} on {peer}: {error}") from error
    if isinstance(message, End):
        return message.value
    if isinstance(message, Failure):
        raise error_of(message, method=method, peer=peer)
    raise LocalProtocolError(f"{method} answers with items; use `async with rpc.stream(...)`")
