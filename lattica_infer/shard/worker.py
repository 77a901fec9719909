"""The one thread in which a device computes, and what it computes for one frame.

Torch runs nowhere else: the event loop stays free for the network while a layer is multiplied. This module
knows tensors; it does not know peers, streams or leases.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import torch
import trio

from lattica.rpc.codec import to_torch
from lattica_infer.messages import Floats, Sampling, StepFrame, VerdictFrame
from lattica_infer.model.kv_cache import KVCache
from lattica_infer.model.transformer import Stage
from lattica_infer.spec.tree import DraftTree
from lattica_infer.spec.verify import walk

_T = TypeVar("_T")


class Worker:
    """One job at a time for one device; jobs wait in the order in which they came.

    Args:
        threads: cores that torch may use for a job. Several peers on one machine take 1 each: with the other
            core busy, two-thread OpenMP fell to a tenth of its speed.
        run_sync: how a job gets off the event loop; a stand-in under a virtual clock, which does not know
            that a thread is still working.
    """

    def __init__(
        self, *, threads: int = 1, run_sync: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync
    ) -> None:
        self.threads = threads
        self._run_sync = run_sync
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, job: Callable[..., _T], *args: Any, abandon_on_cancel: bool = False) -> _T:
        """Run `job(*args)` in the device's thread.

        A cancelled caller waits for its job to end, so that nobody touches a cache that is being written;
        with `abandon_on_cancel` the job goes on alone and its result is dropped (for loading weights).
        """

        def prepared() -> _T:
            # The setting belongs to a thread, and trio may hand us another one after a pause.
            if torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)
            with torch.inference_mode():
                return job(*args)

        result: _T = await self._run_sync(
            prepared, abandon_on_cancel=abandon_on_cancel, limiter=self._limiter
        )
        return result


def compute(
    stage: Stage, cache: KVCache, frame: StepFrame, sampling: Sampling
) -> Floats | VerdictFrame | None:
    """One forward pass: activations for the next stage; at the tail a verdict, or None where none is asked.

    `frame` is checked already: its ids, shapes, commit and row count.

    Raises:
        ValueError: the tail's logits hold NaN.
    """
    cache.commit(frame.commit)
    inputs = torch.tensor(frame.tokens) if frame.hidden is None else to_torch(frame.hidden)
    parents = None if frame.is_chain else torch.tensor(frame.parents)
    if not stage.last:
        hidden = stage.forward(inputs, cache, parents)  # [nodes, hidden]
        return np.ascontiguousarray(hidden.float().cpu().numpy())
    if not frame.walk:
        stage.forward(inputs, cache, parents, rows=torch.empty(0, dtype=torch.int64))
        return None
    rows = stage.forward(inputs, cache, parents)  # [nodes, vocab]
    verdict = walk(
        DraftTree(frame.tokens, frame.parents),
        rows.cpu(),
        position=frame.base,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        logprobs=True,
    )
    return VerdictFrame(
        epoch=frame.epoch,
        window=frame.window,
        tokens=tuple(verdict.tokens),
        path=tuple(verdict.path),
        logprobs=tuple(verdict.logprobs),
    )
