"""Calls between peers: `Rpc` makes them and answers them, over streams that somebody else opens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from lattica.errors import DeadlineError, LocalProtocolError, OverloadedError, StreamError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.protocols import DEFAULT_TIMEOUT_SECONDS
from lattica.rpc.call import ClientCall, Request
from lattica.rpc.channel import Channel
from lattica.rpc.client import ClientStream, Pool, begin, call_once
from lattica.rpc.limits import Limits
from lattica.rpc.methods import Call, Service, current_call
from lattica.rpc.server import Server
from lattica.telemetry import current_trace, new_trace

__all__ = ["Call", "ClientStream", "Limits", "Rpc", "Service"]


class Rpc:
    """Calls under one protocol id, in both directions.

    Knows no network: `open_stream` opens a stream to a peer, and whoever accepts streams gives each to
    `handle`. Tell it with `forget` when a peer's connection is gone.

    A stream carries one call at a time and serves again after a clean end. What a pooled stream's peer may
    have received is never sent twice, unless the caller said `idempotent=True`: a lost stream looks the same
    whether the request was lost with it or its answer.
    """

    def __init__(
        self,
        *,
        local: PeerId | None,
        open_stream: Callable[[PeerId], Awaitable[Stream]],
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self._limits = limits
        self._server = Server(local=local, limits=limits)
        self._pool = Pool(open_stream, limits)
        self._in_flight: dict[PeerId, int] = {}

    def register(self, service: Service) -> None:
        """Answer calls to a service's methods. LocalProtocolError when one of that name is registered."""
        self._server.register(service)

    @property
    def services(self) -> Mapping[str, Service]:
        """What is registered, by name."""
        return self._server.services

    async def handle(self, stream: Stream) -> None:
        """Serve every call that arrives on one inbound stream, until the other side ends it.

        Raises nothing but Cancelled: what a handler raises goes to the caller, and to the log.
        """
        await self._server.handle(stream)

    def forget(self, peer: PeerId) -> None:
        """Drop the idle streams to a peer: its connection is gone, and so are they."""
        self._pool.drop(peer)

    def close(self) -> None:
        """Drop all idle streams. Calls in flight are their callers' to end."""
        self._pool.close()

    async def call(
        self,
        peer: PeerId | str,
        method: str,
        *args: object,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        idempotent: bool = False,
    ) -> Any:
        """Call a method that answers with one value.

        Args:
            timeout: seconds for all of it, dialling included; None waits for as long as it takes. Inside a
                handler the call ends by the handler's own deadline at the latest.
            idempotent: the handler may run twice; the call is made once more if its stream is lost.

        Raises:
            DeadlineError: time is up; the handler is cancelled.
            RemoteError: the handler raised.
            OverloadedError, NoSuchMethodError: the other side did not run it.
            NetworkError: the peer cannot be reached, or was lost in the middle.
            LocalProtocolError: an argument does not travel.
        """
        target = _target(peer)
        end = _End(timeout)
        with self._place(target, method):
            with trio.CancelScope(deadline=end.at):
                try:
                    return await self._once(target, method, args, end)
                except StreamError:
                    if not idempotent:
                        raise
                self._pool.drop(target)  # what broke one of them has probably broken all
                return await self._once(target, method, args, end)
            raise end.error(method, target)

    @asynccontextmanager
    async def stream(
        self, peer: PeerId | str, method: str, *args: object, timeout: float | None = None
    ) -> AsyncIterator[ClientStream]:
        """Call a method with items in either direction: `async with rpc.stream(...) as stream`.

        Leaving the block before the handler's last word cancels the handler. `timeout` is for the whole
        block, in seconds. Raises as `call` does.
        """
        target = _target(peer)
        end = _End(timeout)
        failure: BaseException | None = None
        with self._place(target, method):
            with trio.CancelScope(deadline=end.at):
                channel = await self._pool.get(target)
                call = ClientCall()
                try:
                    await begin(channel, call, _request(method, args, end, more=True), target)
                    async with trio.open_nursery() as nursery:
                        channel.start_reading(nursery)
                        try:
                            stream = ClientStream(channel, call, method=method, peer=target)
                            yield stream
                            await stream.leave()
                        except (trio.Cancelled, GeneratorExit):
                            raise
                        except BaseException as error:
                            failure = error  # raised below, where the nursery cannot wrap it in a group
                            if call.outcome is not None:  # it may be the handler's error: the stream is fine
                                await stream.leave()
                        nursery.cancel_scope.cancel()
                finally:
                    channel.detach()
                    self._give_back(target, channel, call)
                if failure is not None:
                    raise failure
                return
            raise end.error(method, target)

    async def _once(self, peer: PeerId, method: str, args: tuple[object, ...], end: _End) -> Any:
        channel = await self._pool.get(peer)
        call = ClientCall()
        try:
            return await call_once(channel, call, _request(method, args, end, more=False), peer)
        finally:
            self._give_back(peer, channel, call)

    def _give_back(self, peer: PeerId, channel: Channel, call: ClientCall) -> None:
        if call.is_clean:
            self._pool.put(peer, channel)
        else:
            channel.reset()

    @contextmanager
    def _place(self, peer: PeerId, method: str) -> Iterator[None]:
        """One of the places for calls in flight to a peer."""
        running = self._in_flight.get(peer, 0)
        if running >= self._limits.max_calls_per_peer:
            raise OverloadedError(
                f"{method}: {running} calls to {peer} are in flight; wait for some", method=method, peer=peer
            )
        self._in_flight[peer] = running + 1
        try:
            yield
        finally:
            self._in_flight[peer] -= 1
            if not self._in_flight[peer]:
                del self._in_flight[peer]


class _End:
    """When a call must be over: its own timeout, or the deadline of the call that it is made for."""

    __slots__ = ("at", "seconds")

    def __init__(self, timeout: float | None) -> None:
        now = trio.current_time()
        self.at = float("inf") if timeout is None else now + timeout
        call = current_call.get()
        if call is not None and call.is_running and call.deadline is not None:
            self.at = min(self.at, call.deadline)
        self.seconds = max(0.0, self.at - now)

    def remaining(self) -> float | None:
        return None if self.at == float("inf") else max(0.0, self.at - trio.current_time())

    def error(self, method: str, peer: PeerId) -> DeadlineError:
        text = f"{method} on {peer} did not finish within {self.seconds:.3g} s"
        return DeadlineError(text, method=method, peer=peer)


def _request(method: str, args: tuple[object, ...], end: _End, *, more: bool) -> Request:
    return Request(method, list(args), end.remaining(), current_trace.get() or new_trace(), more)


def _target(peer: PeerId | str) -> PeerId:
    try:
        return PeerId.parse(peer)
    except ValueError as error:
        raise LocalProtocolError(str(error)) from error
