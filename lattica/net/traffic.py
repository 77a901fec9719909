"""What a host has moved, as metrics: read when somebody looks, so that counting costs an addition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lattica.net.connection import Traffic
from lattica.telemetry import Metrics

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


@contextmanager
def count(metrics: Metrics | None, traffic: Traffic, connections: Callable[[], int]) -> Iterator[None]:
    """Show a host's traffic in `metrics` for the time of the block."""
    if metrics is None:
        yield
        return
    collector = _Collector(traffic, connections)
    metrics.registry.register(collector)
    try:
        yield
    finally:
        metrics.registry.unregister(collector)


class _Collector:
    def __init__(self, traffic: Traffic, connections: Callable[[], int]) -> None:
        self._traffic = traffic
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        traffic = self._traffic
        moved = CounterMetricFamily(
            "lattica_net_bytes", "Bytes on the wire, encrypted.", labels=["direction"]
        )
        moved.add_metric(["in"], traffic.received_bytes)
        moved.add_metric(["out"], traffic.sent_bytes)
        yield moved
        streams = CounterMetricFamily("lattica_net_streams", "Streams opened.", labels=["by"])
        streams.add_metric(["us"], traffic.streams_opened)
        streams.add_metric(["peers"], traffic.streams_accepted)
        yield streams
        yield GaugeMetricFamily("lattica_net_connections", "Connections now.", value=self._connections())
