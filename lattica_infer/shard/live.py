"""One session under way on one shard: its cache, its stream to the next hop, what the coordinator is told.

`sessions.py` says what is allowed; this module acts on one session from `open` to its end. Its tasks run in
the shard's nursery. Whatever goes wrong ends this session, is told to its coordinator, and touches no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import trio

from lattica.errors import LatticaError, RemoteProtocolError
from lattica.net.api import Host
from lattica.rpc.service import ClientStream, Rpc
from lattica.telemetry import Log
from lattica_infer.errors import InferenceError, ShardLostError
from lattica_infer.messages import Alive, Hop, Opened, StepFrame, VerdictFrame
from lattica_infer.model.kv_cache import KVCache
from lattica_infer.model.transformer import Stage
from lattica_infer.shard.sessions import Session, Sessions
from lattica_infer.shard.worker import Worker, compute

_log = Log("lattica.shard")

_EVENT_BUFFER: Final = 16  # events that a coordinator has not taken yet; then its session waits for it
_CLOSE_SECONDS: Final = (
    5.0  # for the streams between stages to end in order, behind the coordinator's last word
)


class LiveSession:
    """Runs one session. `events` are what its coordinator is told, as plain values; `error` why it ended."""

    def __init__(
        self, session: Session, sessions: Sessions, *, stage: Stage, worker: Worker, rpc: Rpc, host: Host
    ) -> None:
        self.session = session
        self.error: Exception | None = None
        self._sessions = sessions
        self._stage = stage
        self._worker = worker
        self._rpc = rpc
        self._host = host
        self._cache: KVCache | None = None
        self._onward: ClientStream | None = None
        self._onward_ended = trio.Event()
        self._ended = trio.Event()
        self._stepping: trio.CancelScope | None = None
        self._stepped = trio.Event()
        self._tell, self.events = trio.open_memory_channel[list[Any]](_EVENT_BUFFER)

    async def run(self, renewals: AsyncIterator[Any], *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the session until it ends; started once it has its cache and its way to the next hop.

        Raises:
            ShardLostError: the next hop could not be reached (before it is started; afterwards see `error`).
        """
        spec, is_started = self.session.spec, False
        try:
            self._cache = await self._worker.run(self._stage.new_cache, spec.rows)
            async with AsyncExitStack() as stack:
                if spec.next is not None:
                    self._onward = await stack.enter_async_context(self._open_onward(spec.next))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._expire)
                    nursery.start_soon(self._answer, renewals)
                    if self._onward is not None and spec.next is not None:
                        nursery.start_soon(self._watch, self._onward, spec.next)
                    else:
                        self._onward_ended.set()
                    opened = Opened(self._stage.numeric_class, self._sessions.limits.lease_seconds)
                    self._tell.send_nowait(opened.to_value())
                    task_status.started()
                    is_started = True
                    await self._ended.wait()
                    nursery.cancel_scope.cancel()
        except Exception as error:
            if not is_started:
                raise
            _log.error("a session ended by a bug of ours", error, owner=self.session.owner)
            self.fail(error)
        finally:
            self.fail(InferenceError("the shard is closing"))  # unless there was another reason
            if self._stepping is not None:
                self._stepping.cancel()
            self._sessions.close(self.session)
            self._tell.close()
            self._cache = None

    def end(self) -> None:
        """The coordinator left, or is done."""
        self._ended.set()

    def fail(self, error: Exception) -> None:
        """End the session and tell its coordinator why; the first reason counts."""
        if not self._ended.is_set():
            self.error = error
            self._ended.set()

    async def step(self, frames: AsyncIterator[Any]) -> None:
        """Take frames from the previous hop until it has no more, each computed before the next is looked at.

        Raises:
            RemoteProtocolError: the session has its step stream already.
            Exception: whatever ended the session.
        """
        if self._stepping is not None or self._ended.is_set():
            raise RemoteProtocolError("the session has its step stream already, or has ended")
        with trio.CancelScope() as self._stepping:
            try:
                async for value in frames:
                    await self._advance(value)
                if self._onward is not None:
                    await self._onward.finish()
                await self._onward_ended.wait()
            except Exception as error:
                self.fail(error)  # unless the session has ended already: then this is only how we notice
            finally:
                # Broken off by the previous hop? The coordinator learns why there, and ends the session here.
                self._stepped.set()
        if self.error is not None:
            raise self.error

    async def _advance(self, value: object) -> None:
        config, session, cache = self._stage.config, self.session, self._cache
        assert cache is not None
        frame = StepFrame.from_value(
            value, vocab=config.vocab_size, width=None if self._stage.first else config.hidden_size
        )
        session.accept(frame)
        self._sessions.renew(session, now=trio.current_time())
        result = await self._worker.run(compute, self._stage, cache, frame, session.spec.sampling)
        if isinstance(result, VerdictFrame):
            session.bytes_sent += result.payload_bytes
            await self._tell.send(result.to_value())
        elif result is not None and self._onward is not None:
            onward = dataclasses.replace(frame, hidden=result)
            await self._onward.send(onward.to_value())
            session.bytes_sent += onward.payload_bytes
        session.sent += 1

    async def _expire(self) -> None:
        while (left := self.session.expires - trio.current_time()) > 0:
            with trio.move_on_after(left):  # renewals move the end
                await self._ended.wait()
        lease = self._sessions.limits.lease_seconds
        self.fail(InferenceError(f"the lease ran out: nothing heard for {lease:g} s"))

    async def _answer(self, renewals: AsyncIterator[Any]) -> None:
        """Say that we are alive as often as the coordinator asks; its last word ends the session in order."""
        try:
            async for value in renewals:
                if value is not None:
                    raise RemoteProtocolError("a renewal holds nothing")
                self._sessions.renew(self.session, now=trio.current_time())
                await self._tell_alive()
            if self._stepping is not None:
                with trio.move_on_after(_CLOSE_SECONDS):
                    await self._stepped.wait()
            await self._tell_alive()
            self.end()
        except LatticaError as error:
            self.fail(error)

    async def _tell_alive(self) -> None:
        session = self.session
        await self._tell.send(Alive(session.received, session.sent, session.bytes_sent).to_value())

    async def _watch(self, onward: ClientStream, hop: Hop) -> None:
        """Notice the end of our stream to the next hop: after our own last word it is in order."""
        try:
            async for _ in onward:
                raise RemoteProtocolError("a stage sends nothing back", peer=hop.peer)
        except LatticaError as error:
            self.fail(_lost(hop, error))
        self._onward_ended.set()

    @asynccontextmanager
    async def _open_onward(self, hop: Hop) -> AsyncIterator[ClientStream]:
        owner, name = self.session.key
        self._host.add_addresses(hop.peer, hop.addresses)
        layers = [hop.layers.start, hop.layers.stop]
        async with AsyncExitStack() as stack:
            try:
                calling = self._rpc.stream(hop.peer, "shard.step", str(owner), name, layers)
                stream = await stack.enter_async_context(calling)
            except LatticaError as error:
                raise _lost(hop, error) from error
            yield stream


def _lost(hop: Hop, cause: Exception) -> ShardLostError:
    """The error that names a next hop; its details tell the coordinator whom to leave out."""
    layers = f"{hop.layers.start}-{hop.layers.stop - 1}"
    text = f"the shard {hop.peer} (layers {layers}) is lost: {cause}"
    return ShardLostError(text, peer=hop.peer, layers=hop.layers)
