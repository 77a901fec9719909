"""What calls cost, counted in plain numbers where they happen and turned into metrics when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, Literal

from lattica.telemetry import SPAN_BUCKETS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

Side = Literal["caller", "handler"]

OTHER: Final = "other"  # what is beyond a bound counts under this name
MAX_METHODS: Final = 256  # of one side of one protocol; a handler's are those that are registered
MAX_CODES: Final = 32  # kinds of errors of one method: a peer may answer with any text


class MethodStats:
    """The calls of one method on one side."""

    __slots__ = ("buckets", "errors", "in_flight", "received_bytes", "seconds", "sent_bytes")

    def __init__(self) -> None:
        self.buckets = [0] * (len(SPAN_BUCKETS) + 1)
        self.seconds = 0.0
        self.in_flight = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.errors: dict[str, int] = {}

    def ended(self, seconds: float) -> None:
        """A call is over that took so long."""
        self.in_flight -= 1
        self.seconds += seconds
        self.buckets[bisect_left(SPAN_BUCKETS, seconds)] += 1

    def failed(self, code: str) -> None:
        """A call ended with an error: the name of its class."""
        if code not in self.errors and len(self.errors) >= MAX_CODES:
            code = OTHER
        self.errors[code] = self.errors.get(code, 0) + 1


class CallStats:
    """The calls of one side of one protocol, by method."""

    def __init__(self) -> None:
        self.methods: dict[str, MethodStats] = {}

    def of(self, method: str) -> MethodStats:
        """The counts of a method; methods beyond MAX_METHODS share one."""
        found = self.methods.get(method)
        if found is None:
            if len(self.methods) >= MAX_METHODS:
                method = OTHER
            found = self.methods.setdefault(method, MethodStats())
        return found


class CallMetrics:
    """The metrics `lattica_rpc_...` of a node: of each protocol, side and method.

    Call durations, calls in flight, errors by code, and the bytes of frames without their lengths.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stats: dict[tuple[str, Side], CallStats] = {}
        registry.register(self)

    def add(self, protocol: str, side: Side, stats: CallStats) -> None:
        """Show what one side of one protocol counts."""
        self._stats[protocol, side] = stats

    def collect(self) -> Iterable[Metric]:
        """What Prometheus' registry asks for."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        labels = ("protocol", "side", "method")
        seconds = HistogramMetricFamily("lattica_rpc_call_seconds", "Time that calls took.", labels=labels)
        running = GaugeMetricFamily("lattica_rpc_calls_in_flight", "Calls that are running.", labels=labels)
        errors = CounterMetricFamily(
            "lattica_rpc_errors", "Calls that failed, by the error's class.", labels=(*labels, "code")
        )
        size = CounterMetricFamily(
            "lattica_rpc_bytes", "Bytes of arguments, results and items.", labels=(*labels, "direction")
        )
        for name, stats in self._rows():
            seconds.add_metric(name, _cumulative(stats.buckets), stats.seconds)
            running.add_metric(name, stats.in_flight)
            size.add_metric((*name, "sent"), stats.sent_bytes)
            size.add_metric((*name, "received"), stats.received_bytes)
            for code, count in stats.errors.items():
                errors.add_metric((*name, code), count)
        return seconds, running, errors, size

    def _rows(self) -> Iterator[tuple[tuple[str, str, str], MethodStats]]:
        for (protocol, side), stats in self._stats.items():
            # A copy: a metrics page may be built in another thread.
            for method, counts in list(stats.methods.items()):
                yield (protocol, side, method), counts


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    out, total = [], 0
    for bound, count in zip((*map(str, SPAN_BUCKETS), "+Inf"), buckets, strict=True):
        total += count
        out.append((bound, float(total)))
    return out
