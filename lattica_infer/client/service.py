"""Asking a mesh for tokens: find shards, open a session along the cheapest route, decode.

The coordinator holds no layers and imports no torch: it needs the model's configuration and tokenizer only.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from lattica import protocols
from lattica.dht.records import Record
from lattica.errors import LatticaError, OverloadedError, RecordError, RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica_infer.client.generation import (
    Generation,
    GenerationStats,
    GenerationStream,
    Request,
    make_request,
)
from lattica_infer.client.pipeline import StageRefusedError, open_pipeline
from lattica_infer.client.route import Candidate, Plan, cheapest, no_route
from lattica_infer.errors import CacheFullError, InferenceError, NoRouteError
from lattica_infer.messages import Announcement, shards_key
from lattica_infer.model.text import Tokenizer
from lattica_infer.spec.drafters import Drafter
from lattica_infer.tasks import background
from lattica_infer.weights.store import ModelStore, StoredModel

if TYPE_CHECKING:
    from lattica.node import Node

_ASK_AGAIN_SECONDS: Final = 0.5  # while layers are missing: a shard that comes up is found that soon
_PING_SECONDS: Final = 3.0  # for a shard's round trip; one that takes longer is left out of routes
_FRESH_SECONDS: Final = 30.0  # half of an announcement's life
_MAX_ROUTES: Final = 8  # tried for one generation before it fails
_MAX_CANDIDATES: Final = 1024  # believed of one answer; every one costs a ping


@asynccontextmanager
async def open_model(
    node: Node, model: str | os.PathLike[str] | Cid, timeout: float = 30.0
) -> AsyncIterator[Mesh]:
    """A model that the peers of the mesh serve together; enters once live shards cover all its layers.

    Args:
        model: a name from `lattica model ls`, a Cid, or a folder's path: its configuration and tokenizer have
            to be on this machine, its weights do not matter here.
        timeout: seconds to wait for shards.

    Raises:
        NoRouteError: layers stayed without a shard; `missing` names them, the message how to serve them.
        WeightsError: no such model on this machine.
    """
    stored = await trio.to_thread.run_sync(_resolve, model)
    tokenizer = await trio.to_thread.run_sync(Tokenizer, stored.folder)
    mesh = Mesh(node, stored, tokenizer)
    with trio.move_on_after(timeout):
        await mesh.wait_for_route()
    mesh.check_route()
    yield mesh


def _resolve(model: str | os.PathLike[str] | Cid) -> StoredModel:
    return ModelStore().resolve(model if isinstance(model, str | Cid) else os.fspath(model))


class Mesh:
    """A model across the mesh. Made by `open_model`.

    Attributes:
        model: the model as this machine has it.
        tokenizer: text to token ids and back.
    """

    def __init__(self, node: Node, model: StoredModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._node = node
        self._rpc = node.endpoint(protocols.SHARD)
        self._config = model.config
        self._cid = model.cid
        self._candidates: list[Candidate] = []
        self._asked = -_FRESH_SECONDS
        self._why = ""  # the records could not be asked for

    @property
    def shards(self) -> tuple[Candidate, ...]:
        """The live shards that are known now."""
        return tuple(self._candidates)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        drafter: str | Drafter = "auto",
        relaxed: float = 0.0,
        audit: float = 0.0,
    ) -> AbstractAsyncContextManager[GenerationStream]:
        """Generate from a prompt: `async with mesh.generate(...) as stream`, `async for token in stream`.

        Leaving the block ends the generation; every shard frees what it held for it. The iteration raises:
        ShardLostError (a shard died in the middle; it names the peer), NoRouteError, CacheFullError (a shard
        grants fewer rows than prompt and output need), OverloadedError.

        Args:
            prompt: plain text (no chat template; a BOS only if the tokenizer's configuration adds one), or
                token ids as they are.
            max_tokens: cut to what the context holds.
            temperature: 0 takes the likeliest token.
            seed: 0 to 2^64 - 1; the same seed gives the same tokens whatever route and drafter. None: a
                random one, in `stream.stats.seed`.
            stop: strings that end the text before themselves.
            drafter: "auto", "suffix", "none", or a Drafter.
            relaxed, audit: not in this version.

        Raises:
            InferenceError: a value is out of its range, or the prompt leaves the context no room.
        """
        request = make_request(
            prompt,
            tokenizer=self.tokenizer,
            model=self.model.name,
            vocab=self._config.vocab_size,
            context=self._config.context_length,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            drafter=drafter,
            relaxed=relaxed,
            audit=audit,
        )
        return self._generate(request)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **settings: Any
    ) -> AbstractAsyncContextManager[GenerationStream]:
        """Answer a conversation, through the model's own chat template. `settings` as for `generate`.

        Raises:
            InferenceError: the model has no chat template, or its template refuses these messages.
        """
        return self.generate(self.tokenizer.chat(messages), **settings)

    async def discover(self) -> bool:
        """Ask who serves the model, and how far away they are; whether all layers are covered."""
        try:
            records = await self._node.dht.get_all(shards_key(self._cid))
            self._why = ""
        except RecordError as error:
            self._why = str(error)
            return False
        announced = [found for record in records[:_MAX_CANDIDATES] if (found := self._read(record))]
        alive: list[Candidate] = []

        async def measure(candidate: Candidate) -> None:
            rtt = await self._round_trip(candidate)
            if rtt is not None:
                alive.append(
                    Candidate(
                        candidate.peer, candidate.layers, candidate.numeric_class, candidate.addresses, rtt
                    )
                )

        async with trio.open_nursery() as nursery:
            for candidate in announced:
                nursery.start_soon(measure, candidate)
        self._candidates = alive
        self._asked = trio.current_time()
        return self._plan().complete

    async def wait_for_route(self) -> None:
        """Ask until all layers are covered."""
        while True:
            if await self.discover():
                return
            await trio.sleep(_ASK_AGAIN_SECONDS)

    def check_route(self) -> None:
        """Raise NoRouteError unless the shards that are known cover the model."""
        plan = self._plan()
        if not plan.complete:
            raise self._no_route(plan, {})

    def _plan(self, without: Mapping[PeerId, object] = {}) -> Plan:
        usable = (candidate for candidate in self._candidates if candidate.peer not in without)
        return cheapest(usable, self._config.num_layers)

    def _no_route(self, plan: Plan, refused: Mapping[PeerId, StageRefusedError]) -> LatticaError:
        """Why there is no route: what the shards said that could have been in it, else what is missing."""
        for refusal in refused.values():
            if isinstance(refusal.cause, CacheFullError | OverloadedError):
                return refusal.cause
        error = no_route(plan, self.model.name, len(self._candidates))
        reasons = [self._why] if self._why else [str(refusal) for refusal in refused.values()]
        return NoRouteError("; ".join([str(error), *reasons]), missing=error.missing)

    def _read(self, record: Record) -> Candidate | None:
        """What an announcement says; None for one that was withdrawn, or is broken."""
        if not record.value:
            return None
        try:
            found = Announcement.from_bytes(record.value)
        except RemoteProtocolError as error:
            self._node.log.warning("a shard's announcement is broken", author=record.author, why=error)
            return None
        if found.layers.stop > self._config.num_layers:
            return None
        return Candidate(record.author, found.layers, found.numeric_class, found.addresses)

    async def _round_trip(self, candidate: Candidate) -> float | None:
        """Seconds to the shard and back; None when it does not answer."""
        if candidate.peer == self._node.peer_id:
            return 0.0
        known = next((peer.rtt for peer in self._node.peers() if peer.peer_id == candidate.peer), None)
        if known is not None:
            return known
        self._node.host.add_addresses(candidate.peer, candidate.addresses)
        with trio.move_on_after(_PING_SECONDS):
            try:
                return await self._node.host.ping(candidate.peer)
            except LatticaError as error:
                self._node.log.debug("a shard does not answer", peer=candidate.peer, why=error)
        return None

    @asynccontextmanager
    async def _generate(self, request: Request) -> AsyncIterator[GenerationStream]:
        stats = GenerationStats(
            seed=request.sampling.seed, drafter=request.drafter.name, prompt_tokens=len(request.prompt)
        )
        stream = GenerationStream(stats)
        async with background() as nursery:
            nursery.start_soon(self._run, request, stream)
            yield stream

    async def _run(self, request: Request, stream: GenerationStream) -> None:
        try:
            await self._run_somewhere(request, stream)
        except LatticaError as error:
            stream.end(error)
        except trio.Cancelled:
            stream.end(InferenceError("the generation was left before its end"))
            raise
        else:
            stream.end()

    async def _run_somewhere(self, request: Request, stream: GenerationStream) -> None:
        """Generate along the cheapest route whose stages all take us."""
        generation = Generation(
            request,
            stream,
            tokenizer=self.tokenizer,
            vocab=self._config.vocab_size,
            started=trio.current_time(),
        )
        if trio.current_time() - self._asked > _FRESH_SECONDS:
            await self.discover()
        refused: dict[PeerId, StageRefusedError] = {}
        while True:
            plan = self._plan(refused)
            if not plan.complete or len(refused) >= _MAX_ROUTES:
                raise self._no_route(plan, refused)
            try:
                async with open_pipeline(
                    self._rpc,
                    self._node.host,
                    plan.stages,
                    model=self._cid,
                    rows=request.rows,
                    sampling=request.sampling,
                    vocab=self._config.vocab_size,
                ) as pipeline:
                    await generation.run(pipeline)
                stream.stats.bytes_sent = pipeline.bytes_sent
                return
            except StageRefusedError as error:
                self._node.log.info("a shard is left out of the route", peer=error.peer, why=error)
                refused[error.peer] = error
            await self.discover()
