"""Serving layers: load them, announce them, answer `open` and `step` of `/lattica/shard/1.0.0`.

A node has one `ShardService`, whatever number of shards it serves; `serve_shard` adds one for as long as its
block runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

from lattica import protocols
from lattica.errors import LatticaError, OverloadedError, RecordError, RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica.rpc.service import Call, Rpc, Service
from lattica_infer import checks
from lattica_infer.errors import InferenceError
from lattica_infer.layers import check_layers
from lattica_infer.messages import Announcement, SessionSpec, owner_id, session_id, shards_key
from lattica_infer.model.transformer import Stage
from lattica_infer.shard.fit import check_device, check_dtype, session_limits, weight_bytes
from lattica_infer.shard.live import LiveSession
from lattica_infer.shard.sessions import SessionLimits, Sessions
from lattica_infer.shard.worker import Worker
from lattica_infer.tasks import background
from lattica_infer.weights.loading import load_stage_tensors
from lattica_infer.weights.store import ModelStore, StoredModel

if TYPE_CHECKING:
    from lattica.node import Node

ANNOUNCE_TTL_SECONDS: Final = 60.0  # a shard that was killed stays in the lists for that long at most
ANNOUNCE_AGAIN_SECONDS: Final = 20.0  # two renewals may be lost
_LOOK_SECONDS: Final = 2.0  # how soon new addresses of ours are told
_FIRST_ANNOUNCE_SECONDS: Final = 30.0  # until somebody keeps our record; then serving has failed
_WITHDRAW_SECONDS: Final = 1.0
_EARLY_STEP_SECONDS: Final = 10.0  # a step stream may come before its session's `open`: they travel apart
_MAX_EARLY_STEPS: Final = 256

_SessionKey = tuple[PeerId, bytes, int, int]


@dataclass(slots=True, eq=False)
class Shard:
    """Layers of a model that this node serves."""

    model: StoredModel
    layers: range
    numeric_class: str
    dtype: str
    weight_bytes: int
    stage: Stage = field(repr=False)
    worker: Worker = field(repr=False)
    sessions: Sessions = field(repr=False)
    nursery: trio.Nursery = field(repr=False)

    @property
    def name(self) -> str:
        return f"layers {self.layers.start}-{self.layers.stop - 1} of {self.model.cid}"


class ShardService(Service):
    """The methods `shard.open` and `shard.step`, for all shards of one node."""

    def __init__(self, node: Node, rpc: Rpc) -> None:
        super().__init__("shard")
        self._node = node
        self._rpc = rpc
        self._shards: list[Shard] = []
        self._live: dict[_SessionKey, LiveSession] = {}
        self._early: dict[_SessionKey, trio.Event] = {}
        self.add("open", self._open)
        self.add("step", self._step)

    @classmethod
    def of(cls, node: Node) -> ShardService:
        """The node's one service; registered when it is first asked for."""
        rpc = node.endpoint(protocols.SHARD)
        found = rpc.services.get("shard")
        if isinstance(found, cls):
            return found
        service = cls(node, rpc)
        rpc.register(service)
        return service

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self._shards)

    @contextmanager
    def serving(self, shard: Shard) -> Iterator[None]:
        """Answer for `shard` while the block runs; its sessions fail when it ends."""
        if any(other.model.cid == shard.model.cid and other.layers == shard.layers for other in self._shards):
            raise InferenceError(f"this node serves {shard.name} already")
        self._shards.append(shard)
        try:
            yield
        finally:
            self._shards.remove(shard)

    async def _open(self, call: Call, value: object) -> AsyncIterator[Any]:
        """Hold a session as long as the caller keeps this call open.

        Items of the caller: None, a renewal of the lease. Items back: "opened", then "alive" for each
        renewal, and at the tail a "verdict" for each frame that asks for one.
        """
        owner = _caller(call)
        spec = SessionSpec.from_value(value)
        shard = self._find(spec, owner)
        session = shard.sessions.admit(owner, spec, now=trio.current_time())
        key = (owner, spec.session, spec.layers.start, spec.layers.stop)
        live = self._live[key] = LiveSession(
            session,
            shard.sessions,
            stage=shard.stage,
            worker=shard.worker,
            rpc=self._rpc,
            host=self._node.host,
        )
        try:
            if key in self._early:
                self._early[key].set()
            await shard.nursery.start(live.run, call.items)
            async for event in live.events:
                yield event
            if live.error is not None:
                raise live.error
        finally:
            live.end()
            del self._live[key]

    async def _step(self, call: Call, owner: object, session: object, layers: object) -> None:
        """Take the frames of a session from its previous hop, one after the other."""
        stage_layers = checks.layer_range(layers)
        key = (owner_id(owner), session_id(session), stage_layers.start, stage_layers.stop)
        live = await self._expected(key)
        if _caller(call) != live.session.spec.previous:
            raise RemoteProtocolError("the session takes frames from its previous hop alone")
        await live.step(call.items)

    async def _expected(self, key: _SessionKey) -> LiveSession:
        """The session of this name, which its coordinator may be opening just now."""
        if key not in self._live:
            if len(self._early) >= _MAX_EARLY_STEPS:
                raise OverloadedError("too many streams wait for their session to be opened")
            opened = self._early.setdefault(key, trio.Event())
            try:
                with trio.move_on_after(_EARLY_STEP_SECONDS):
                    await opened.wait()
            finally:
                if self._early.get(key) is opened:
                    del self._early[key]
            if key not in self._live:
                raise InferenceError("no such session is open here")
        return self._live[key]

    def _find(self, spec: SessionSpec, owner: PeerId) -> Shard:
        """The shard that a spec means. Raises InferenceError or RemoteProtocolError, saying what is served."""
        shards = [shard for shard in self._shards if shard.model.cid == spec.model]
        if not shards:
            raise InferenceError(f"no layers of model {spec.model} are served here, but {self._served()}")
        shard = next((shard for shard in shards if shard.layers == spec.layers), None)
        if shard is None:
            wanted = f"layers {spec.layers.start}-{spec.layers.stop - 1}"
            raise InferenceError(f"{wanted} of model {spec.model} are not served here, but {self._served()}")
        if spec.numeric_class not in (None, shard.numeric_class):
            raise InferenceError(f"the numeric class here is {shard.numeric_class}, not {spec.numeric_class}")
        if shard.stage.first and spec.previous != owner:
            raise RemoteProtocolError("the first stage takes its frames from the coordinator")
        follows = None if spec.next is None else spec.next.layers.start
        if follows != (None if shard.stage.last else shard.layers.stop):
            raise RemoteProtocolError(f"layers {shard.layers} hand over to {follows}")
        return shard

    def _served(self) -> str:
        return ", ".join(shard.name for shard in self._shards) or "nothing"


@asynccontextmanager
async def serve_shard(
    node: Node,
    model: str | os.PathLike[str] | Cid,
    layers: range | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    max_memory: int | None = None,
    *,
    threads: int = 1,
    worker: Worker | None = None,
    limits: SessionLimits | None = None,
) -> AsyncIterator[Shard]:
    """Serve some layers of a model while the block runs; enters once others can find them.

    The range with layer 0 holds the embedding, the one with the last layer norm, head and walk.

    Args:
        model: a name from `lattica model ls`, a Cid, or a folder's path.
        layers: as in Python, `range(0, 10)` is the first ten; None for all.
        dtype: "fp32", "bf16" or "fp16"; None is the fastest that keeps outputs identical: fp32 on a CPU.
        max_memory: bytes for weights and cache together; checked before anything is loaded.
        threads: cores for one forward pass. Leave 1 where several peers share a machine.
        worker: the device's thread, where several shards of this process share one device.
        limits: what sessions may take, in place of what fits the memory.

    Raises:
        WeightsError: no such model, or its files are damaged.
        InferenceError: layers that the model doesn't have, too little memory, a device that isn't there.
        RecordError: nobody keeps the announcement.
    """
    stored = await trio.to_thread.run_sync(_resolve, model)
    config = stored.config
    wanted = check_layers(layers, config.num_layers, stored.name)
    place = check_device(device)
    kind = check_dtype(dtype, place)
    bounds = limits or session_limits(config, wanted, kind, max_memory)
    worker = worker or Worker(threads=threads)

    def load() -> Stage:
        return Stage(config, load_stage_tensors(stored.folder, wanted), wanted, device=place, dtype=kind)

    stage = await worker.run(load, abandon_on_cancel=True)
    service = ShardService.of(node)
    async with background() as nursery:
        shard = Shard(
            model=stored,
            layers=wanted,
            numeric_class=stage.numeric_class,
            dtype=str(kind).removeprefix("torch."),
            weight_bytes=weight_bytes(config, wanted, kind),
            stage=stage,
            worker=worker,
            sessions=Sessions(bounds),
            nursery=nursery,
        )
        with service.serving(shard):
            announcer = _Announcer(node, shard)
            await nursery.start(announcer.run)
            try:
                yield shard
            finally:
                nursery.cancel_scope.cancel()
                await announcer.withdraw()


class _Announcer:
    """Keeps the record of one shard true: renewed in time, told anew when our addresses change."""

    def __init__(self, node: Node, shard: Shard) -> None:
        self._node = node
        self._shard = shard
        self._key = shards_key(shard.model.cid)
        self._subkey = f"{shard.layers.start}-{shard.layers.stop}"

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Announce until cancelled; started once somebody keeps the record. Raises RecordError before."""
        give_up = trio.current_time() + _FIRST_ANNOUNCE_SECONDS
        told: list[str] = []
        due, is_found = -math.inf, False
        while True:
            addresses = list(self._node.addresses)
            if trio.current_time() >= due or addresses != told:
                try:
                    await self._put(self._announcement(addresses), ANNOUNCE_TTL_SECONDS)
                    told, due = addresses, trio.current_time() + ANNOUNCE_AGAIN_SECONDS
                    if not is_found:
                        self._node.serves[self._label] = str(self._shard.model.cid)
                        task_status.started()
                        is_found = True
                except RecordError as error:
                    if not is_found and trio.current_time() >= give_up:
                        raise
                    self._node.log.warning(
                        "a shard could not be announced", shard=self._shard.name, why=error
                    )
            await trio.sleep(_LOOK_SECONDS)

    async def withdraw(self) -> None:
        """Replace the record by an empty one, so that nobody asks for the shard any more."""
        self._node.serves.pop(self._label, None)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _WITHDRAW_SECONDS):
            try:
                await self._put(b"", _WITHDRAW_SECONDS)
            except LatticaError as error:  # it runs out by itself
                self._node.log.debug("a shard could not be withdrawn", shard=self._shard.name, why=error)

    @property
    def _label(self) -> str:
        """What `lattica peers` shows."""
        return f"{self._shard.model.name} {self._shard.layers.start}:{self._shard.layers.stop}"

    async def _put(self, value: bytes, ttl: float) -> None:
        await self._node.dht.put(self._key, value, ttl=ttl, subkey=self._subkey)

    def _announcement(self, addresses: list[str]) -> bytes:
        return Announcement(
            layers=self._shard.layers,
            numeric_class=self._shard.numeric_class,
            dtype=self._shard.dtype,
            addresses=tuple(addresses[: checks.MAX_ADDRESSES]),
        ).to_bytes()


def _caller(call: Call) -> PeerId:
    if call.peer is None:
        raise RemoteProtocolError("a session belongs to a peer")
    return call.peer


def _resolve(model: str | os.PathLike[str] | Cid) -> StoredModel:
    return ModelStore().resolve(model if isinstance(model, str | Cid) else os.fspath(model))
