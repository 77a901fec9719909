"""What inference adds to a running node: the control methods behind `lattica shard serve`, `shards`, `generate`.

Loaded by the entry point `lattica.services` in every node, so torch waits until the first shard is served.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from lattica.ids import Cid
from lattica.rpc.service import Call, Service
from lattica_infer.errors import InferenceError
from lattica_infer.tasks import background

if TYPE_CHECKING:
    from lattica.node import Node
    from lattica_infer.client.service import Mesh
    from lattica_infer.shard.worker import Worker
    from lattica_infer.weights.store import StoredModel

_SERVE_SETTINGS: Final = frozenset({"device", "dtype", "max_memory", "threads"})
_GENERATE_SETTINGS: Final = frozenset(
    {"max_tokens", "temperature", "seed", "top_k", "top_p", "stop", "drafter", "raw", "timeout"}
)


@asynccontextmanager
async def open_services(node: Node) -> AsyncIterator[None]:
    """Offer inference on the node's control socket while the block runs."""
    async with background() as nursery:
        node.control.register(_Commands(node, nursery).service())
        yield


class _Commands:
    """The control methods `infer.*`; every one is what a command of `lattica_infer.cli` asks for."""

    def __init__(self, node: Node, nursery: trio.Nursery) -> None:
        self._node = node
        self._nursery = nursery
        self._meshes: dict[Cid, Mesh] = {}
        self._workers: dict[tuple[str, int], Worker] = {}

    def service(self) -> Service:
        service = Service("infer")
        for method in (self.serve, self.serve_on, self.shards, self.generate):
            service.add(method.__name__, method)
        return service

    async def serve(
        self, call: Call, model: str, layers: list[int] | None, settings: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """Serve a shard for as long as the caller stays: one item once others can find it, then none."""
        stop = trio.Event()
        told = await self._nursery.start(self._hold, model, layers, settings, stop)
        try:
            yield told
            await trio.sleep_forever()
        finally:
            stop.set()

    async def serve_on(
        self, call: Call, model: str, layers: list[int] | None, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Serve a shard until the node stops; answers once others can find it."""
        told: dict[str, Any] = await self._nursery.start(self._hold, model, layers, settings, trio.Event())
        return told

    async def shards(self, call: Call, model: str | None) -> list[dict[str, Any]]:
        """The live shards of a model, or of every model on this machine, in layer order."""
        from lattica_infer.weights.store import ModelStore

        store = ModelStore()
        models = await trio.to_thread.run_sync(
            store.list if model is None else lambda: [store.resolve(model)]
        )
        rows: list[dict[str, Any]] = []
        for stored in models:
            mesh = await self._mesh(stored)
            await mesh.discover()
            for shard in sorted(mesh.shards, key=lambda s: (s.layers.start, s.layers.stop, s.peer)):
                rows.append(
                    {
                        "model": stored.name,
                        "cid": str(stored.cid),
                        "layers": [shard.layers.start, shard.layers.stop],
                        "peer_id": str(shard.peer),
                        "rtt_ms": None if shard.rtt is None else round(shard.rtt * 1000, 3),
                        "numeric_class": shard.numeric_class,
                    }
                )
        return rows

    async def generate(
        self, call: Call, model: str, prompt: Any, settings: dict[str, Any]
    ) -> AsyncIterator[list[Any]]:
        """Items `["token", id, text, logprob]`, then one `["stats", map]`.

        `prompt`: text, or a list of token ids. Text is a user's message where the model has a chat template,
        unless `settings["raw"]`.
        """
        from lattica_infer.weights.store import ModelStore

        wanted = _known(settings, _GENERATE_SETTINGS)
        is_raw, timeout = bool(wanted.pop("raw", False)), float(wanted.pop("timeout", 30.0))
        stored = await trio.to_thread.run_sync(ModelStore().resolve, model)
        mesh = await self._mesh(stored)
        with trio.move_on_after(timeout):
            await mesh.wait_for_route()
        mesh.check_route()
        if isinstance(prompt, str) and mesh.tokenizer.has_chat_template and not is_raw:
            prompt = mesh.tokenizer.chat([{"role": "user", "content": prompt}])
        # The tokens come from a task of their own: a nursery must not be open where a generator yields.
        tell, items = trio.open_memory_channel[list[Any]](0)
        failure: list[Exception] = []
        scope = trio.CancelScope()
        self._nursery.start_soon(_relay, mesh, prompt, wanted, tell, failure, scope)
        try:
            async for item in items:
                yield item
        finally:
            scope.cancel()
        if failure:
            raise failure[0]

    async def _mesh(self, stored: StoredModel) -> Mesh:
        """The model, opened once: its tokenizer takes a while to read."""
        from lattica_infer.client.service import Mesh
        from lattica_infer.model.text import Tokenizer

        if stored.cid not in self._meshes:
            tokenizer = await trio.to_thread.run_sync(Tokenizer, stored.folder)
            self._meshes[stored.cid] = Mesh(self._node, stored, tokenizer)
        return self._meshes[stored.cid]

    async def _hold(
        self,
        model: str,
        layers: list[int] | None,
        settings: dict[str, Any],
        stop: trio.Event,
        *,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve a shard until `stop`; started with what the command prints. Raises before that only."""
        from lattica_infer.shard.service import serve_shard
        from lattica_infer.shard.worker import Worker

        wanted = _known(settings, _SERVE_SETTINGS)
        device, threads = str(wanted.get("device", "cpu")), int(wanted.pop("threads", 1))
        worker = self._workers.setdefault((device, threads), Worker(threads=threads))
        chosen = None if layers is None else range(*layers)
        told: dict[str, Any] | None = None
        try:
            async with serve_shard(self._node, model, chosen, worker=worker, **wanted) as shard:
                told = {
                    "model": shard.model.name,
                    "cid": str(shard.model.cid),
                    "layers": [shard.layers.start, shard.layers.stop],
                    "numeric_class": shard.numeric_class,
                    "weight_bytes": shard.weight_bytes,
                    "peer_id": str(self._node.peer_id),
                }
                task_status.started(told)
                await stop.wait()
        except Exception as error:
            if told is None:
                raise
            self._node.log.error("a shard ended by a bug of ours", error, shard=told)


async def _relay(
    mesh: Mesh,
    prompt: Any,
    settings: Mapping[str, Any],
    tell: trio.MemorySendChannel[list[Any]],
    failure: list[Exception],
    scope: trio.CancelScope,
) -> None:
    """Generate and pass the tokens on, then the stats; an error goes to `failure`."""
    with scope, tell:
        try:
            async with mesh.generate(prompt, **settings) as stream:
                async for token in stream:
                    await tell.send(["token", token.id, token.text, token.logprob])
            await tell.send(["stats", stream.stats.to_value()])
        except Exception as error:  # the command's to hear, whatever it is: never the node's end
            failure.append(error)


def _known(settings: object, names: frozenset[str]) -> dict[str, Any]:
    """The settings of a command, if all are known here: a newer command may ask for more than we have."""
    if not isinstance(settings, dict) or not names.issuperset(settings):
        raise InferenceError(f"settings are a map of {', '.join(sorted(names))}, not {str(settings)[:200]}")
    return dict(settings)
