"""The cheapest chain of shards that covers a model. Pure: announcements and round trips in, a plan out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lattica.ids import PeerId
from lattica_infer.errors import NoRouteError

STAGE_SECONDS: Final = 0.002  # a stage's decode, queue and encode; breaks ties towards few stages
UNKNOWN_RTT_SECONDS: Final = 0.1  # of a peer that was never pinged: a usual path across a country


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live shard as announced. `rtt` in seconds from us, None when never measured."""

    peer: PeerId
    layers: range
    numeric_class: str
    addresses: tuple[str, ...] = ()
    rtt: float | None = None

    @property
    def cost_seconds(self) -> float:
        """What the stage adds to a round.

        Only round trips from here are known. By way of us, the link from a to b takes at most
        rtt_a / 2 + rtt_b / 2; summed around the ring each stage counts its whole round trip once.
        """
        return STAGE_SECONDS + (UNKNOWN_RTT_SECONDS if self.rtt is None else self.rtt)


@dataclass(frozen=True, slots=True)
class Plan:
    """A chain in layer order. `missing`: the fewest layers that somebody must serve to make it whole."""

    stages: tuple[Candidate, ...]
    missing: tuple[int, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def numeric_classes(self) -> tuple[str, ...]:
        return tuple(sorted({stage.numeric_class for stage in self.stages}))


def cheapest(candidates: Iterable[Candidate], layer_count: int) -> Plan:
    """The plan of least cost; one numeric class where that is possible, several where it isn't.

    Stages hand over where the next begins: a shard runs all its layers or none. Equal costs go to fewer
    stages, then to the lower peer ids: every coordinator with the same knowledge takes the same chain.
    """
    fitting = [c for c in candidates if c.layers.stop <= layer_count]
    classes = sorted({c.numeric_class for c in fitting})
    pure = [_chain([c for c in fitting if c.numeric_class == name], layer_count) for name in classes]
    whole = [plan for plan in pure if plan.complete]
    if whole:
        return min(whole, key=_order)
    return _chain(fitting, layer_count)


def no_route(plan: Plan, model: str, found: int) -> NoRouteError:
    """The error for a plan with gaps; its message says how to fill them."""
    gaps = _runs(plan.missing)
    names = ", ".join(f"{gap.start}-{gap.stop - 1}" if len(gap) > 1 else f"{gap.start}" for gap in gaps)
    ways = " and ".join(f'"lattica shard serve {model} --layers {gap.start}:{gap.stop}"' for gap in gaps)
    subject = f"layers {names} have" if len(plan.missing) > 1 else f"layer {names} has"
    return NoRouteError(
        f"no route: {subject} no live shard ({found} found); serve with {ways}",
        missing=plan.missing,
    )


def _chain(candidates: Sequence[Candidate], layer_count: int) -> Plan:
    """Dynamic programming over layer boundaries; a layer that nobody serves is an edge that costs one gap."""
    ending: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        ending.setdefault(candidate.layers.stop, []).append(candidate)
    best = [Plan((), (), 0.0)]
    for boundary in range(1, layer_count + 1):
        before = best[boundary - 1]
        ways = [Plan(before.stages, (*before.missing, boundary - 1), before.seconds)]
        for candidate in ending.get(boundary, ()):
            before = best[candidate.layers.start]
            ways.append(
                Plan((*before.stages, candidate), before.missing, before.seconds + candidate.cost_seconds)
            )
        best.append(min(ways, key=_order))
    return best[layer_count]


def _order(plan: Plan) -> tuple[object, ...]:
    names = [(str(stage.peer), stage.layers.start, stage.numeric_class) for stage in plan.stages]
    return len(plan.missing), plan.seconds, len(plan.stages), names


def _runs(layers: Sequence[int]) -> list[range]:
    runs: list[range] = []
    for layer in layers:
        if runs and runs[-1].stop == layer:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs
