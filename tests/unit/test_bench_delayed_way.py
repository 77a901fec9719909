"""One direction of the benches' delayed link: order, rate, delay, the bound of its queue, loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeWay = Callable[..., Any]


@pytest.fixture
def way(repository: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWay:
    """A way of 50 ms and 1,000,000 B/s, or as asked."""
    monkeypatch.syspath_prepend(repository / "tools")
    from delayed_link import Way

    def make(**changed: Any) -> Any:
        settings = {"delay": 0.05, "rate": 1e6, "loss": 0.0, "queue_bytes": 100_000, "rng": random.Random(0)}
        return Way(**(settings | changed))

    return make


def test_a_packet_arrives_no_earlier_than_the_delay(way: MakeWay) -> None:
    link = way()
    link.take(b"x" * 1000, now=10.0)
    assert 10.05 <= link.next_arrival <= 10.051
    assert list(link.arrived(10.049)) == []
    assert list(link.arrived(10.052)) == [b"x" * 1000]
    assert link.next_arrival == float("inf")


def test_packets_keep_their_order_and_leave_at_the_rate(way: MakeWay) -> None:
    link = way()
    packets = [bytes([number]) * 1000 for number in range(100)]
    for packet in packets:
        link.take(packet, now=10.0)
    half = list(link.arrived(10.05 + 0.05))
    assert 45 <= len(half) <= 55, "50 ms at 1 MB/s carry 50 packets of 1,000 B"
    assert half + list(link.arrived(10.2)) == packets


def test_the_queue_is_bounded_and_drops_from_its_tail(way: MakeWay) -> None:
    link = way(queue_bytes=10_000)
    for number in range(100):
        link.take(bytes([number]) * 1000, now=10.0)
    arrived = [packet[0] for packet in link.arrived(11.0)]
    assert arrived == list(range(len(arrived)))
    assert 10 <= len(arrived) <= 13, "ten in the queue, and what the link may catch up"
    assert link.dropped == 100 - len(arrived)


def test_a_way_that_was_idle_does_not_send_faster_afterwards(way: MakeWay) -> None:
    link = way()
    link.take(b"x", now=0.0)
    assert list(link.arrived(1.0)) == [b"x"]
    for _ in range(100):
        link.take(b"x" * 1000, now=10.0)
    assert len(list(link.arrived(10.05 + 0.05))) <= 53


@pytest.mark.parametrize("loss", [0.0, 0.1, 1.0])
def test_the_share_that_was_asked_for_is_lost(way: MakeWay, loss: float) -> None:
    link = way(loss=loss, queue_bytes=1 << 30)
    for _ in range(2000):
        link.take(b"x", now=10.0)
    assert link.lost == pytest.approx(2000 * loss, abs=60 if 0 < loss < 1 else 0)
    assert len(list(link.arrived(20.0))) == 2000 - link.lost
