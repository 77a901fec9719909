"""Logs that machines and people can read, metrics per node, spans that catch nothing."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica import LocalProtocolError
from lattica.telemetry import Log, LogFormat, LogLevel, Metrics, configure, current_trace, new_trace, span


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("lattica", "lattica_infer", "libp2p"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def captured(style: LogFormat, level: LogLevel = "debug") -> io.StringIO:
    stream = io.StringIO()
    configure(level, style, stream=stream)
    return stream


def test_a_json_line_holds_event_fields_and_trace() -> None:
    stream = captured("json")
    token = current_trace.set("abc")
    Log("lattica.x").bind(peer="P").info("connected", rtt=0.5, tries=[1, 2])
    current_trace.reset(token)
    line = json.loads(stream.getvalue())
    del line["time"]
    assert line == {
        "level": "info", "logger": "lattica.x", "event": "connected", "peer": "P", "rtt": 0.5,
        "tries": [1, 2], "trace": "abc",
    }  # fmt: skip


def test_a_human_line_reads_as_words() -> None:
    stream = captured("human")
    Log("lattica.x").warning("peer lost", why="went away", seconds=1.23456)
    assert stream.getvalue().endswith('warning lattica.x: peer lost why="went away" seconds=1.235\n')


@given(event=st.text(max_size=30), field=st.text(max_size=30), style=st.sampled_from(["human", "json"]))
def test_no_text_breaks_a_line(event: str, field: str, style: LogFormat) -> None:
    stream = captured(style)
    Log("lattica.x").info(event, field=field, number=math.nan)
    assert stream.getvalue().isascii() or style == "human"
    assert len(stream.getvalue().splitlines()) == 1
    if style == "json":
        assert json.loads(stream.getvalue())["field"] == field


def test_an_error_line_carries_the_traceback() -> None:
    stream = captured("json")
    try:
        raise ValueError("boom")
    except ValueError as error:
        Log("lattica.x").exception("handler failed", peer="P")
        caught = error
    Log("lattica.x").error("told later", caught)
    assert ["ValueError: boom" in json.loads(line)["error"] for line in stream.getvalue().splitlines()] == [
        True
    ] * 2


def test_other_libraries_do_not_drown_our_debug_lines() -> None:
    stream = captured("human", "debug")
    logging.getLogger("multiaddr.transforms").debug("decoded")
    logging.getLogger("multiaddr.transforms").warning("odd")
    Log("lattica.x").debug("ours")
    assert [line.split(": ")[-1] for line in stream.getvalue().splitlines()] == ["odd", "ours"]


def test_two_nodes_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.counter("lattica_streams", "Streams.", ["protocol"]).labels("/x").inc()
    assert b'lattica_streams_total{protocol="/x"} 1.0' in one.exposition()
    assert b"lattica_streams" not in other.exposition()


def test_a_metric_is_named_once() -> None:
    metrics = Metrics()
    metrics.gauge("lattica_peers", "Peers.").set(3)
    assert metrics.gauge("lattica_peers", "Peers.") is metrics.gauge("lattica_peers", "Peers.")
    with pytest.raises(LocalProtocolError, match="is a Gauge, not a Counter"):
        metrics.counter("lattica_peers", "Peers.")


def test_a_span_measures_and_names_the_outcome() -> None:
    stream, metrics, times = captured("json"), Metrics(), iter([10.0, 10.25, 20.0, 20.5])
    log = Log("lattica.x")
    with span("dial", log=log, metrics=metrics, clock=lambda: next(times), peer="P"):
        log.info("inside")
    with pytest.raises(KeyError), span("dial", log=log, metrics=metrics, clock=lambda: next(times)):
        raise KeyError
    inside, ok, failed = map(json.loads, stream.getvalue().splitlines())
    assert (ok["event"], ok["seconds"], ok["outcome"], ok["peer"]) == ("dial", 0.25, "ok", "P")
    assert (failed["seconds"], failed["outcome"]) == (0.5, "KeyError")
    assert inside["trace"] == ok["trace"] != failed["trace"]
    assert current_trace.get() == ""
    assert b'lattica_span_seconds_sum{outcome="ok",span="dial"} 0.25' in metrics.exposition()


def test_trace_ids_are_64_random_bits_in_hex() -> None:
    one, other = new_trace(), new_trace()
    assert one != other
    assert len(bytes.fromhex(one)) == 8
