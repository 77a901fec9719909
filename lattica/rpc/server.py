"""Answering calls: inbound streams are read, their calls run, and what each peer keeps busy is counted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import trio

from lattica.errors import (
    DeadlineError,
    LatticaError,
    LocalProtocolError,
    NoSuchMethodError,
    OverloadedError,
    ProtocolError,
    RemoteProtocolError,
    StreamError,
)
from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.rpc.call import End, Failure, Item, Request, ServerCalls, pack
from lattica.rpc.channel import Budget, Channel
from lattica.rpc.failures import failure_of, single
from lattica.rpc.limits import Limits
from lattica.rpc.methods import Call, Method, Service, current_call
from lattica.telemetry import Log, current_trace, new_trace

_log = Log("lattica.rpc")
_FAREWELL_SECONDS = 1.0  # for telling a caller that its deadline has passed; it knows that by itself


@dataclass(slots=True)
class _Load:
    """What one peer keeps busy here."""

    budget: Budget
    streams: int = 0
    calls: int = 0


@dataclass(slots=True)
class _Inbound:
    """One stream that calls arrive on."""

    channel: Channel
    peer: PeerId | None
    load: _Load
    calls: ServerCalls = field(default_factory=ServerCalls)

    async def take(self) -> Request | Item | End | None:
        """The next message from the caller, None at the stream's end."""
        while (body := await self.channel.take()) is not None:
            message = self.calls.receive(body)
            if message is not None:
                return message
        return None


class _Items:
    """The caller's items, read from the stream only as the handler asks for them."""

    __slots__ = ("_inbound", "_is_over")

    def __init__(self, inbound: _Inbound) -> None:
        self._inbound = inbound
        self._is_over = False

    def __aiter__(self) -> _Items:
        return self

    async def __anext__(self) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._is_over or not self._inbound.calls.has_more:
            raise StopAsyncIteration
        message = await self._inbound.take()
        match message:
            case Item(value):
                return value
            case None:
                raise StreamError("the caller ended its stream in the middle of the call")
        raise StopAsyncIteration

    def close(self) -> None:
        self._is_over = True


class Server:
    """Runs handlers for inbound streams. Has no task of its own: `handle` runs in the caller's."""

    def __init__(self, *, local: PeerId | None, limits: Limits) -> None:
        self._local = local
        self._limits = limits
        self._services: dict[str, Service] = {}
        self._loads: dict[PeerId | None, _Load] = {}

    @property
    def services(self) -> Mapping[str, Service]:
        return self._services

    def register(self, service: Service) -> None:
        if service.name in self._services:
            raise LocalProtocolError(f"a service {service.name} is registered already")
        self._services[service.name] = service

    async def handle(self, stream: Stream) -> None:
        """Serve every call on one stream until the other side ends it; raises nothing but Cancelled."""
        limits, peer = self._limits, stream.peer
        load = self._loads.get(peer)
        if load is None:
            load = self._loads[peer] = _Load(
                Budget(max(limits.max_buffered_bytes_per_peer, limits.max_frame_bytes))
            )
        if load.streams >= limits.max_streams_per_peer:
            _log.warning("a peer opens too many streams", peer=peer, limit=limits.max_streams_per_peer)
            stream.reset()
            return
        load.streams += 1
        channel = Channel(stream, max_frame_bytes=limits.max_frame_bytes, budget=load.budget)
        inbound = _Inbound(channel, peer, load)
        is_whole = False
        try:
            async with trio.open_nursery() as nursery:
                channel.start_reading(nursery)
                is_whole = await self._serve(inbound)
                nursery.cancel_scope.cancel()
            if is_whole:
                await channel.aclose()
        finally:
            load.streams -= 1
            if not load.streams:
                del self._loads[peer]
            if not is_whole:
                channel.reset()

    async def _serve(self, inbound: _Inbound) -> bool:
        """Calls, one after the other; whether the stream may be closed in peace."""
        try:
            while (request := await inbound.take()) is not None:
                if not isinstance(request, Request):
                    continue  # left over from a call whose handler did not read all items
                await self._answer(inbound, request)
                if inbound.channel.is_broken:
                    return False
        except RemoteProtocolError as error:
            _log.warning("a peer broke the rpc protocol", peer=inbound.peer, reason=error)
            with trio.move_on_after(_FAREWELL_SECONDS) as farewell:
                try:
                    await inbound.channel.send(pack(failure_of(error)))
                except StreamError:
                    return False
            return not farewell.cancelled_caught
        except StreamError:
            return False
        return True

    async def _answer(self, inbound: _Inbound, request: Request) -> None:
        load = inbound.load
        if load.calls >= self._limits.max_calls_per_peer:
            error = OverloadedError(
                f"{request.method}: {load.calls} calls of this peer are running; try again later"
            )
            await self._end(inbound, failure_of(error))
            return
        load.calls += 1
        deadline = None if request.timeout is None else trio.current_time() + request.timeout
        trace = request.trace or new_trace()
        items = _Items(inbound)
        call = Call(inbound.peer, self._local, request.method, deadline, trace, items)
        # Set, not inherited: the task that reads a connection may have been started by anybody.
        call_token, trace_token = current_call.set(call), current_trace.set(trace)
        try:
            await self._run(inbound, call, request)
        finally:
            call.is_running = False
            items.close()
            current_trace.reset(trace_token)
            current_call.reset(call_token)
            load.calls -= 1
            inbound.channel.on_end = None

    async def _run(self, inbound: _Inbound, call: Call, request: Request) -> None:
        """Run the handler, send what it gives, then its outcome. Raises StreamError when nobody listens."""
        channel = inbound.channel
        scope = trio.CancelScope(deadline=float("inf") if call.deadline is None else call.deadline)
        channel.on_end = scope.cancel
        if channel.is_ended:
            scope.cancel()
        try:
            with scope:
                await self._send_result(inbound, call, request.args)
        except (Exception, SystemExit) as error:
            is_left = channel.is_broken or channel.is_ended
            if not (is_left and isinstance(single(error), StreamError)):
                self._report(call, error)
            if is_left:
                raise StreamError("the caller has left") from error
            failure = failure_of(error)
        else:
            if not scope.cancelled_caught:
                return
            if channel.is_broken or channel.is_ended:
                raise StreamError("the caller has left")
            failure = failure_of(
                DeadlineError(f"{call.method} on {self._local} did not finish within {request.timeout:.3g} s")
            )
        with trio.move_on_after(_FAREWELL_SECONDS) if scope.cancelled_caught else trio.CancelScope():
            await self._end(inbound, failure)

    async def _send_result(self, inbound: _Inbound, call: Call, args: list[Any]) -> None:
        method = self._find(call.method)
        if refusal := method.refusal(args):
            await self._end(inbound, Failure("TypeError", f"{call.method} {refusal}", {}))
            return
        running = method.start(call, args)
        if not method.is_stream:
            await self._end(inbound, End(await running))
            return
        async with aclosing(running):
            async for item in running:
                await inbound.channel.send(pack(Item(item)))
        await self._end(inbound, End(None))

    async def _end(self, inbound: _Inbound, outcome: End | Failure) -> None:
        await inbound.channel.send(inbound.calls.outcome(outcome))

    def _find(self, name: str) -> Method:
        service, _, method = name.rpartition(".")
        found = self._services[service].methods.get(method) if service in self._services else None
        if found is None:
            raise NoSuchMethodError(
                f"no method {name!r:.80} here; services: {', '.join(sorted(self._services))}"
            )
        return found

    def _report(self, call: Call, error: BaseException) -> None:
        """One line for what a handler raised; a traceback only for what nobody meant to raise."""
        cause = single(error)
        fields = {"method": call.method, "peer": call.peer, "trace": call.trace, "reason": _reason(cause)}
        if isinstance(cause, LatticaError) and not isinstance(cause, ProtocolError):
            _log.info("a call failed", **fields)
        else:
            _log.error("a handler raised", error, **fields)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"
