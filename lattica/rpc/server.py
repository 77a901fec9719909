"""Answering calls: inbound streams are read, their calls run, and what each peer keeps busy is counted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing

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
from lattica.rpc.call import End, Failure, Item, Refused, Request, pack
from lattica.rpc.deadlines import Deadlines
from lattica.rpc.failures import failure_of, single
from lattica.rpc.inbound import NO_ITEMS, Inbound, Items
from lattica.rpc.limits import Limits, Load
from lattica.rpc.methods import Call, Method, Service, current_call
from lattica.rpc.metrics import OTHER, CallStats, MethodStats
from lattica.telemetry import Log, current_trace, new_trace

_log = Log("lattica.rpc")
_FAREWELL_SECONDS = 1.0  # for telling a caller that its deadline has passed; it knows that by itself


class Server:
    """Runs handlers for inbound streams. Has no task of its own: `handle` runs in the caller's."""

    def __init__(self, *, local: PeerId | None, limits: Limits, deadlines: Deadlines) -> None:
        self.stats = CallStats()
        self._local = local
        self._limits = limits
        self._deadlines = deadlines
        self._services: dict[str, Service] = {}
        self._loads: dict[PeerId | None, Load] = {}

    @property
    def services(self) -> Mapping[str, Service]:
        return self._services

    def register(self, service: Service) -> None:
        if service.name in self._services:
            raise LocalProtocolError(f"a service {service.name} is registered already")
        self._services[service.name] = service

    def load_of(self, peer: PeerId | None) -> Load | None:
        """What a peer keeps busy here; None when it has no stream."""
        return self._loads.get(peer)

    async def handle(self, stream: Stream) -> None:
        """Serve every call on one stream until the other side ends it; raises nothing but Cancelled."""
        limits, peer = self._limits, stream.peer
        load = self._loads.get(peer)
        if load is None:
            load = self._loads[peer] = Load(limits)
        if load.streams >= limits.max_streams_per_peer:
            await self._turn_away(stream, load)
            return
        load.streams += 1
        inbound = Inbound(stream, limits, load)
        is_whole = False
        try:
            is_whole = await self._serve(inbound)
            if is_whole:
                await inbound.channel.aclose()
        finally:
            load.streams -= 1
            if not load.streams:
                del self._loads[peer]
            inbound.close()
            if not is_whole:
                inbound.channel.reset()

    async def _turn_away(self, stream: Stream, load: Load) -> None:
        """Answer the call that a stream too many will bring, and end it."""
        _log.warning("a peer opens too many streams", peer=stream.peer, limit=load.streams)
        error = OverloadedError(
            f"{load.streams} streams of this peer are open; try again later", retry_after=load.retry_after
        )
        try:
            told = stream.send_nowait(pack(failure_of(error)))
        except StreamError:
            told = False
        if told:
            await stream.aclose()
        else:
            stream.reset()

    async def _serve(self, inbound: Inbound) -> bool:
        """Calls, one after the other; whether the stream may be closed in peace."""
        while not inbound.is_gone:
            left_over: BaseException | None = None
            # One scope for many calls: it is used up by the first that has to be cancelled.
            scope = inbound.scope = trio.CancelScope()
            try:
                with scope:
                    await self._answer_all(inbound, scope)
                    if not scope.cancel_called:
                        return True
            except (Exception, SystemExit) as error:
                if scope.cancelled_caught:
                    left_over = error  # what a handler raised beside Cancelled
                elif isinstance(error, RemoteProtocolError):
                    return self._part(inbound, error)
                elif isinstance(error, StreamError):
                    return False
                else:
                    raise
            call = inbound.running
            inbound.running = None
            if (
                call is None or inbound.is_gone
            ):  # without a call: the handler ended all the same, and was answered
                continue
            if left_over is not None:
                self._report(call, left_over)
            with trio.move_on_after(_FAREWELL_SECONDS) as farewell:
                try:
                    await inbound.send(inbound.calls.outcome(failure_of(self._time_is_up(call))))
                except StreamError:
                    return False
            if farewell.cancelled_caught:
                return False
        return False

    def _time_is_up(self, call: Call) -> DeadlineError:
        seconds = 0.0 if call.deadline is None else call.deadline - call.began
        return DeadlineError(f"{call.method} on {self._local} did not finish within {seconds:.3g} s")

    def _part(self, inbound: Inbound, error: RemoteProtocolError) -> bool:
        """Tell a peer that it broke the protocol; whether it may hear that."""
        _log.warning("a peer broke the rpc protocol", peer=inbound.peer, reason=error)
        try:
            return inbound.channel.send_now(pack(failure_of(error)))
        except StreamError:
            return False

    async def _answer_all(self, inbound: Inbound, scope: trio.CancelScope) -> None:
        """Calls until the stream ends, or one of them used up the scope.

        Raises StreamError and RemoteProtocolError.
        """
        while not scope.cancel_called:
            message = await inbound.take()
            if message is None:
                return
            if isinstance(message, Request):
                await self._answer(inbound, message)
                await inbound.channel.take_turn()
            elif isinstance(message, Refused) and message.is_request:
                error = OverloadedError(
                    "the arguments of this peer's running calls leave no room for those of this one;"
                    " try again later",
                    retry_after=inbound.load.retry_after,
                )
                self.stats.of(OTHER).failed("OverloadedError")
                await inbound.send(inbound.calls.outcome(failure_of(error)))
            # else: left over from a call whose handler did not read all items

    async def _answer(self, inbound: Inbound, request: Request) -> None:
        load, name = inbound.load, request.method
        method = self._find(name)
        stats = self.stats.of(name if method is not None else OTHER)
        inbound.stats = stats
        stats.received_bytes += inbound.frame_bytes
        if load.calls >= self._limits.max_calls_per_peer:
            error = OverloadedError(
                f"{name}: {load.calls} calls of this peer are running; try again later",
                retry_after=load.retry_after,
            )
            inbound.release()
            stats.failed("OverloadedError")
            await inbound.send(inbound.calls.outcome(failure_of(error)))
            return
        began = trio.current_time()
        deadline = None if request.timeout is None else began + request.timeout
        trace = request.trace or new_trace()
        items = Items(inbound) if request.more else NO_ITEMS
        call = Call(inbound.peer, self._local, name, deadline, trace, items, began=began)
        load.calls += 1
        stats.in_flight += 1
        inbound.running, inbound.is_expired = call, False
        if deadline is not None:
            self._deadlines.hold(inbound, deadline)
        # Set, not inherited: the task that reads a connection may have been started by anybody.
        call_token, trace_token = current_call.set(call), current_trace.set(trace)
        try:
            await self._run(inbound, call, method, request.args, stats)
        finally:
            call.is_running = False
            items.close()
            current_trace.reset(trace_token)
            current_call.reset(call_token)
            if deadline is not None:
                self._deadlines.release(inbound)
            seconds = trio.current_time() - began
            stats.ended(seconds)
            load.ended(seconds)
            inbound.release()
            if inbound.running is not None:  # cancelled: by its deadline, its caller, or with the node
                stats.failed("DeadlineError" if inbound.is_expired else "Cancelled")

    async def _run(
        self, inbound: Inbound, call: Call, method: Method | None, args: list[object], stats: MethodStats
    ) -> None:
        """Run the handler, send what it gives, then its outcome. Raises StreamError when nobody listens."""
        outcome: End | Failure
        try:
            if method is None:
                raise NoSuchMethodError(
                    f"no method {call.method!r:.80} here; services: {', '.join(sorted(self._services))}"
                )
            if refusal := method.refusal(args):
                outcome = Failure("TypeError", f"{call.method} {refusal}", {})
            elif method.is_stream:
                async with aclosing(method.start(call, args)) as running:
                    async for item in running:
                        await inbound.send(pack(Item(item), max_bytes=self._limits.max_reply_bytes))
                outcome = End(None)
            else:
                outcome = End(await method.start(call, args))
            parts = inbound.calls.outcome(outcome, max_bytes=self._limits.max_reply_bytes)
        except (Exception, SystemExit) as error:
            if inbound.fault is not None:  # the caller's bytes, not the handler's mistake
                raise inbound.fault from None
            if inbound.is_gone and isinstance(single(error), StreamError):
                raise StreamError("the caller has left") from error
            self._report(call, error)
            outcome = failure_of(error)
            parts = inbound.calls.outcome(outcome)
        if inbound.fault is not None:
            raise inbound.fault
        if isinstance(outcome, Failure):
            stats.failed(outcome.code)
        if not inbound.channel.send_now(parts):
            await inbound.channel.send(parts)
        stats.sent_bytes += sum(map(len, parts))
        inbound.running = None

    def _find(self, name: str) -> Method | None:
        service, _, method = name.rpartition(".")
        found = self._services.get(service)
        return None if found is None else found.methods.get(method)

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
