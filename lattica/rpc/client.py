"""The caller's side of a call: streams kept for the next call, and the stream that a program holds."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.protocols import LOOK_AFTER_SECONDS
from lattica.rpc.call import ClientCall, End, Failure, Item, Request, is_outcome
from lattica.rpc.channel import Channel
from lattica.rpc.codec import Part
from lattica.rpc.failures import error_of
from lattica.rpc.limits import Limits


class Pool:
    """Idle streams, per peer; the one used last is used next, so that the others may go cold.

    A stream is kept only after a clean end of its call. One that has been idle for a while is looked at
    before it is used: a peer that went away in the meantime costs a new stream, not a failed call.
    """

    def __init__(self, open_stream: Callable[[PeerId], Awaitable[Stream]], limits: Limits) -> None:
        self._open_stream = open_stream
        self._limits = limits
        self._idle: dict[PeerId, list[Channel]] = {}

    async def get(self, peer: PeerId) -> Channel:
        """An idle stream that lives, else a new one. Raises what opening one raises."""
        idle = self._idle.get(peer)
        while idle:
            channel = idle.pop()
            if trio.current_time() - channel.idle_since <= LOOK_AFTER_SECONDS:
                return channel
            try:
                is_quiet = await channel.is_quiet()
            except BaseException:
                channel.reset()
                raise
            if is_quiet:
                return channel
            channel.reset()
        stream = await self._open_stream(peer)
        return Channel(stream, max_frame_bytes=self._limits.max_frame_bytes)

    def put(self, peer: PeerId, channel: Channel) -> None:
        """Keep a stream whose call has ended cleanly; when there are enough of them, end it."""
        idle = self._idle.setdefault(peer, [])
        if channel.is_reusable and len(idle) < self._limits.max_pooled_streams:
            channel.idle_since = trio.current_time()
            idle.append(channel)
        else:
            channel.reset()

    def drop(self, peer: PeerId) -> None:
        """End the idle streams to a peer."""
        for channel in self._idle.pop(peer, ()):
            channel.reset()

    def close(self) -> None:
        for peer in list(self._idle):
            self.drop(peer)


class ClientStream:
    """A call with items in either direction, made by `Rpc.stream`.

    Iterate it for the handler's items, `send` items to it, `finish` to say that those were all, `result` for
    what the handler returns. One task may iterate while another sends.
    """

    def __init__(self, channel: Channel, call: ClientCall, *, method: str, peer: PeerId) -> None:
        self.method = method
        self.peer = peer
        self._channel = channel
        self._call = call

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
        returned. Raises what the handler raised, if it did, and StreamError.
        """
        if self._is_over():
            self._raise(self._call.outcome)
            return
        await self._send(self._call.item(item))

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
            while (body := await self._channel.take()) is not None:
                if (message := self._call.receive(body)) is not None:
                    return message
        except RemoteProtocolError as error:
            error.peer = self.peer
            raise
        except StreamError as error:
            raise self._lost(error) from error
        raise self._lost("the stream ended in the middle of the call")

    async def _send(self, parts: list[Part]) -> None:
        # A handler that ends early is no reason to break off: its side drops what still comes, so a send that
        # waits for room ends soon, and the stream stays whole for the next call.
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
                self._call.receive(taken)
            except RemoteProtocolError as error:
                error.peer = self.peer
                raise
        return True

    def _raise(self, outcome: End | Failure | None) -> None:
        if isinstance(outcome, Failure):
            raise error_of(outcome, method=self.method, peer=self.peer)

    def _lost(self, why: object) -> StreamError:
        return StreamError(f"{self.method} on {self.peer}: {why}")


async def begin(channel: Channel, call: ClientCall, request: Request, peer: PeerId) -> None:
    """Send a request. Raises LocalProtocolError, with nothing sent, when an argument does not travel."""
    parts = call.request(request)
    try:
        await channel.send(parts)
    except StreamError as error:
        raise StreamError(f"{request.method} on {peer}: {error}") from error


async def call_once(channel: Channel, call: ClientCall, request: Request, peer: PeerId) -> Any:
    """Make a unary call over a stream that is between calls; its result."""
    method = request.method
    await begin(channel, call, request, peer)
    try:
        while (body := await channel.take()) is not None:
            match call.receive(body):
                case End(value):
                    return value
                case Failure() as failure:
                    raise error_of(failure, method=method, peer=peer)
                case Item():
                    raise LocalProtocolError(f"{method} answers with items; use `async with rpc.stream(...)`")
    except RemoteProtocolError as error:
        error.peer = peer
        raise
    except StreamError as error:
        raise StreamError(f"{method} on {peer}: {error}") from error
    raise StreamError(f"{method} on {peer}: the stream ended in the middle of the call")
