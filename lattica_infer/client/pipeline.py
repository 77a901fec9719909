"""A session at every stage of a route: opened at once, fed frames, listened to, closed in order.

The coordinator holds no layers. It keeps one stream to each stage (`open`: renewals down, answers and, from
the tail, verdicts up) and one to the first stage (`step`: frames down). Torch is not imported here.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from lattica.errors import LatticaError, OverloadedError, RemoteError, RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica.net.api import Host
from lattica.rpc.service import ClientStream, Rpc
from lattica_infer.client.route import Candidate
from lattica_infer.client.watch import RENEW_SECONDS, StageWatch
from lattica_infer.errors import CacheFullError, InferenceError, ShardLostError
from lattica_infer.messages import (
    SESSION_ID_BYTES,
    Alive,
    Hop,
    Opened,
    Sampling,
    SessionSpec,
    StepFrame,
    VerdictFrame,
    event_from_value,
)
from lattica_infer.tasks import background

_OPEN_SECONDS: Final = 15.0  # a dial of the next hop that times out, and the answer that it did
_CLOSE_SECONDS: Final = 3.0  # for all stages to end in order; then the streams are broken off
_VERDICT_BUFFER: Final = 16  # a tail that sends more than was asked for waits


class StageRefusedError(InferenceError):
    """A stage of a route cannot be used now. `peer` is whom to leave out, `cause` what to tell the user."""

    def __init__(self, stage: Candidate, cause: LatticaError) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.peer = cause.peer if isinstance(cause, ShardLostError) and cause.peer else stage.peer


class Pipeline:
    """An open session on all stages of a route. Made by `open_pipeline`."""

    def __init__(self, stages: Sequence[Candidate], *, rpc: Rpc, vocab: int) -> None:
        self.stages = tuple(stages)
        self.error: LatticaError | None = None
        self._rpc = rpc
        self._vocab = vocab
        self._watch = StageWatch(len(self.stages), now=trio.current_time())
        self._step: ClientStream | None = None
        self._sent = 0
        self._bytes_sent = 0
        self._closing = trio.Event()
        self._open_stages = 0
        self._all_closed = trio.Event()
        self._tell, self._verdicts = trio.open_memory_channel[VerdictFrame](_VERDICT_BUFFER)

    @property
    def bytes_sent(self) -> int:
        """Payload bytes over all links, as far as the stages have told; all of them after an orderly end."""
        return self._bytes_sent + self._watch.bytes_sent

    async def send(self, frame: StepFrame) -> None:
        """Send a frame to the first stage; waits for room on the link, never for an answer.

        Raises as `verdict` does.
        """
        assert self._step is not None
        if self.error is None:
            try:
                await self._step.send(frame.to_value())
            except LatticaError as error:
                self._fail(0, error)
        if self.error is not None:
            raise self.error
        self._sent += 1
        self._bytes_sent += frame.payload_bytes

    async def verdict(self) -> VerdictFrame:
        """The tail's next verdict.

        Raises:
            ShardLostError: a stage died, fell silent, or failed; it names the peer and its layers.
            CacheFullError: a stage has no rows left.
        """
        try:
            return await self._verdicts.receive()
        except trio.EndOfChannel:
            assert self.error is not None
            raise self.error from None

    async def open(self, nursery: trio.Nursery, owner: PeerId, specs: Sequence[SessionSpec]) -> None:
        """Open every session and the way to the first stage, all at once; they live in `nursery`.

        Raises:
            StageRefusedError: the first stage that could not be used.
        """
        refused: list[StageRefusedError] = []
        waiting = set(range(len(specs)))

        async def open_stage(index: int) -> None:
            try:
                await nursery.start(self._hold, index, specs[index], nursery)
                if index == 0:
                    await nursery.start(self._feed, owner, specs[0])
                waiting.discard(index)
            except StageRefusedError as error:
                refused.append(error)
                opening.cancel_scope.cancel()

        with trio.move_on_after(_OPEN_SECONDS):
            async with trio.open_nursery() as opening:
                for index in range(len(specs)):
                    opening.start_soon(open_stage, index)
        if not refused and waiting:
            stage = self.stages[min(waiting)]
            silent = LatticaError(f"no answer within {_OPEN_SECONDS:g} s")
            refused.append(StageRefusedError(stage, _lost(stage, silent)))
        if refused:
            raise refused[0]
        nursery.start_soon(self._look)

    async def close(self) -> None:
        """Say the last word to every stage, and hear theirs."""
        self._closing.set()
        with trio.move_on_after(_CLOSE_SECONDS):
            if self._step is not None:
                with contextlib.suppress(LatticaError):
                    await self._step.finish()
            await self._all_closed.wait()

    async def _hold(
        self,
        index: int,
        spec: SessionSpec,
        nursery: trio.Nursery,
        *,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep the session at one stage; started once the stage has opened it."""
        stage, is_open = self.stages[index], False
        try:
            async with self._rpc.stream(stage.peer, "shard.open", spec.to_value()) as stream:
                async for value in stream:
                    event = event_from_value(value, vocab=self._vocab)
                    if isinstance(event, Opened) is is_open:
                        raise RemoteProtocolError(f"{type(event).__name__} out of turn", peer=stage.peer)
                    if not isinstance(event, Opened):
                        await self._take(index, event)
                        continue
                    if event.numeric_class != stage.numeric_class:
                        raise RemoteProtocolError(
                            f"it was announced as {stage.numeric_class}, and is {event.numeric_class}"
                        )
                    is_open = True
                    self._open_stages += 1
                    nursery.start_soon(self._renew, index, stream)
                    task_status.started()
            if not self._closing.is_set():
                raise RemoteProtocolError("it ended the session", peer=stage.peer)
        except LatticaError as error:
            if not is_open:
                raise StageRefusedError(stage, self._cause(index, error)) from error
            self._fail(index, error)
        self._open_stages -= 1
        if not self._open_stages:
            self._all_closed.set()

    async def _feed(
        self,
        owner: PeerId,
        spec: SessionSpec,
        *,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep the stream to the first stage, and notice when that stage ends it."""
        layers = [spec.layers.start, spec.layers.stop]
        try:
            async with self._rpc.stream(
                self.stages[0].peer, "shard.step", str(owner), spec.session, layers
            ) as self._step:
                task_status.started()
                async for _ in self._step:
                    raise RemoteProtocolError("a stage sends nothing back")
            if not self._closing.is_set():
                raise RemoteProtocolError("it ended the step stream")
        except LatticaError as error:
            if self._step is None:
                raise StageRefusedError(self.stages[0], self._cause(0, error)) from error
            self._fail(0, error)

    async def _renew(self, index: int, stream: ClientStream) -> None:
        """Renew one stage's lease until we close; then say our last word there."""
        try:
            while not self._closing.is_set():
                await stream.send(None)
                with trio.move_on_after(RENEW_SECONDS):
                    await self._closing.wait()
            await stream.finish()
        except LatticaError as error:
            self._fail(index, error)

    async def _look(self) -> None:
        """Give up on a stage that falls silent, or that frames no longer reach."""
        while not self._closing.is_set():
            await trio.sleep(RENEW_SECONDS)
            lost = self._watch.lost(sent=self._sent, now=trio.current_time())
            if lost is not None:
                index, why = lost
                self._fail(index, LatticaError(why))

    async def _take(self, index: int, event: VerdictFrame | Alive) -> None:
        now = trio.current_time()
        if isinstance(event, Alive):
            self._watch.answered(index, event, now=now)
            return
        if index != len(self.stages) - 1:
            raise RemoteProtocolError("a verdict from a stage that is not the tail")
        self._watch.heard(index, now=now)
        if self.error is None:
            await self._tell.send(event)

    def _fail(self, index: int, error: LatticaError) -> None:
        """End the pipeline; the first reason counts."""
        if self.error is None and not self._closing.is_set():
            self.error = self._cause(index, error)
            self._tell.close()

    def _cause(self, index: int, error: LatticaError) -> LatticaError:
        """What an error at a stage means for the generation."""
        if isinstance(error, OverloadedError):
            return error
        if isinstance(error, RemoteError):
            if error.code == "CacheFullError":
                return CacheFullError(error.text)
            if error.code == "ShardLostError":  # it lost the stage behind it, and says whom
                blamed = [stage for stage in self.stages if str(stage.peer) == error.details.get("peer")]
                if blamed:
                    return _lost(blamed[0], error)
        return _lost(self.stages[index], error)


@asynccontextmanager
async def open_pipeline(
    rpc: Rpc,
    host: Host,
    stages: Sequence[Candidate],
    *,
    model: Cid,
    rows: int,
    sampling: Sampling,
    vocab: int,
) -> AsyncIterator[Pipeline]:
    """Open a session at every stage, all at the same time, and close them with the block.

    A block that ends by itself ends the sessions in order, so that the streams serve again; one that raises
    or is cancelled breaks them off. Either way every stage frees its rows.

    Raises:
        StageRefusedError: one of the stages cannot be used; the others are freed again.
    """
    for stage in stages:
        host.add_addresses(stage.peer, stage.addresses)
    pipeline = Pipeline(stages, rpc=rpc, vocab=vocab)
    specs = session_specs(stages, owner=host.peer_id, model=model, rows=rows, sampling=sampling)
    async with background() as nursery:
        await pipeline.open(nursery, host.peer_id, specs)
        yield pipeline
        await pipeline.close()


def session_specs(
    stages: Sequence[Candidate], *, owner: PeerId, model: Cid, rows: int, sampling: Sampling
) -> list[SessionSpec]:
    """What each stage of a route is asked for, in order."""
    session = secrets.token_bytes(SESSION_ID_BYTES)
    hops = [Hop(stage.peer, stage.layers, stage.addresses) for stage in stages]
    return [
        SessionSpec(
            session=session,
            model=model,
            layers=stage.layers,
            rows=rows,
            previous=stages[index - 1].peer if index else owner,
            next=hops[index + 1] if index + 1 < len(hops) else None,
            numeric_class=stage.numeric_class,
            sampling=sampling,
        )
        for index, stage in enumerate(stages)
    ]


def _lost(stage: Candidate, why: LatticaError) -> ShardLostError:
    reason = why.text if isinstance(why, RemoteError) else str(why)
    return ShardLostError(
        f"the shard {stage.peer} (layers {stage.layers.start}-{stage.layers.stop - 1}) is lost: {reason}",
        peer=stage.peer,
        layers=stage.layers,
    )
