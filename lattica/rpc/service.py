"""Calls between peers: `Rpc` makes them and answers them, over streams that somebody else opens."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import trio

from lattica.errors import DeadlineError, LocalProtocolError, OverloadedError, RemoteError, StreamError
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.protocols import DEFAULT_TIMEOUT_SECONDS
from lattica.rpc.call import ClientCall, Request
from lattica.rpc.channel import Channel
from lattica.rpc.client import ClientStream, begin, call_once
from lattica.rpc.deadlines import Deadlines
from lattica.rpc.limits import Limits
from lattica.rpc.methods import Call, Service, current_call
from lattica.rpc.metrics import CallMetrics, CallStats
from lattica.rpc.pool import Pool
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
        self._deadlines = Deadlines()
        self._server = Server(local=local, limits=limits, deadlines=self._deadlines)
        self._pool = Pool(open_stream, limits, self._deadlines)
        self._in_flight: dict[PeerId, int] = {}
        self._stats = CallStats()

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
        self._deadlines.close()

    def show(self, metrics: CallMetrics, protocol: str) -> None:
        """Let a node's metrics tell of the calls made and answered here."""
        metrics.add(protocol, "caller", self._stats)
        metrics.add(protocol, "handler", self._server.stats)

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
            LocalProtocolError: an argument does not travel, or all of them are over `max_argument_bytes`.
        """
        target = peer if type(peer) is PeerId else _target(peer)
        end = _End(timeout)
        place = _Place(self, target, method)
        try:
            try:
                return await self._once(target, method, args, end, place)
            except StreamError:
                if not idempotent:
                    raise
            self._pool.drop(target)  # what broke one of them has probably broken all
            return await self._once(target, method, args, end, place)
        except BaseException as error:
            place.failed(error)
            raise
        finally:
            place.leave()

    @asynccontextmanager
    async def stream(
        self, peer: PeerId | str, method: str, *args: object, timeout: float | None = None
    ) -> AsyncIterator[ClientStream]:
        """Call a method with items in either direction: `async with rpc.stream(...) as stream`.

        Leaving the block before the handler's last word cancels the handler. `timeout` is for the whole
        block, in seconds. Raises as `call` does.
        """
        target = peer if type(peer) is PeerId else _target(peer)
        end = _End(timeout)
        place = _Place(self, target, method)
        call = ClientCall()
        try:
            with trio.CancelScope(deadline=end.at):
                channel = await self._pool.get(target)
                try:
                    request = _request(method, args, end, more=True)
                    await begin(channel, call, request, target, self._limits, place.stats)
                    stream = ClientStream(
                        channel, call, method=method, peer=target, limits=self._limits, stats=place.stats
                    )
                    try:
                        yield stream
                    except Exception:
                        if call.outcome is not None:  # it may be the handler's error: the stream is fine
                            await stream.leave()
                        raise
                    await stream.leave()
                finally:
                    self._give_back(target, channel, call)
                return
            raise end.error(method, target)
        except BaseException as error:
            place.failed(error)
            raise
        finally:
            place.leave()

    async def _once(
        self, peer: PeerId, method: str, args: tuple[object, ...], end: _End, place: _Place
    ) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        channel = self._pool.get_idle(peer)
        if channel is None:
            with trio.CancelScope(deadline=end.at):
                channel = await self._pool.open(peer)
            if channel is None:
                raise end.error(method, peer)
        call = ClientCall()
        has_deadline = end.at < math.inf
        if has_deadline:
            self._deadlines.hold(channel, end.at)
        try:
            request = _request(method, args, end, more=False)
            return await call_once(channel, call, request, peer, self._limits, place.stats)
        except StreamError:
            if channel.is_expired:
                raise end.error(method, peer) from None
            raise
        finally:
            if has_deadline:
                self._deadlines.release(channel)
            self._give_back(peer, channel, call)

    def _give_back(self, peer: PeerId, channel: Channel, call: ClientCall) -> None:
        if call.is_clean and not channel.is_broken:
            self._pool.put(peer, channel)
        else:
            channel.reset()


class _Place:
    """One of the places for calls in flight to a peer. OverloadedError when all are taken."""

    __slots__ = ("_began", "_in_flight", "_peer", "stats")

    def __init__(self, rpc: Rpc, peer: PeerId, method: str) -> None:
        self._in_flight = rpc._in_flight
        self._peer = peer
        self._began = trio.current_time()
        self.stats = rpc._stats.of(method)
        running = self._in_flight.get(peer, 0)
        if running >= rpc._limits.max_calls_per_peer:
            self.stats.failed("OverloadedError")
            raise OverloadedError(
                f"{method}: {running} calls to {peer} are in flight; wait for some", method=method, peer=peer
            )
        self._in_flight[peer] = running + 1
        self.stats.in_flight += 1

    def failed(self, error: BaseException) -> None:
        """The call ended with an error."""
        self.stats.failed(error.code if isinstance(error, RemoteError) else type(error).__name__)

    def leave(self) -> None:
        """The call is over."""
        self.stats.ended(trio.current_time() - self._began)
        left = self._in_flight[self._peer] - 1
        if left:
            self._in_flight[self._peer] = left
        else:
            del self._in_flight[self._peer]


class _End:
    """When a call must be over: its own timeout, or the deadline of the call that it is made for."""

    __slots__ = ("at", "seconds")

    def __init__(self, timeout: float | None) -> None:
        now = trio.current_time()
        self.at = math.inf if timeout is None else now + timeout
        call = current_call.get()
        if call is not None and call.is_running and call.deadline is not None:
            self.at = min(self.at, call.deadline)
        self.seconds = max(0.0, self.at - now)

    def remaining(self) -> float | None:
        return None if self.at == math.inf else max(0.0, self.at - trio.current_time())

    def error(self, method: str, peer: PeerId) -> DeadlineError:
        text = f"{method} on {peer} did not finish within {self.seconds:.3g} s"
        return DeadlineError(text, method=method, peer=peer)


def _request(method: str, args: tuple[object, ...], end: _End, *, more: bool) -> Request:
    return Request(method, list(args), end.remaining(), current_trace.get() or new_trace(), more)


@lru_cache(maxsize=1024)
def _target(peer: PeerId | str) -> PeerId:
    """Who is meant. Kept for ids that come as text again and again: base58 costs as much as a small call."""
    try:
        return PeerId.parse(peer)
    except ValueError as error:
        raise LocalProtocolError(str(error)) from error
