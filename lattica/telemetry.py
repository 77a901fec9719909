"""What a node says about itself: structured logs, trace ids that cross the wire, and metrics.

Logs go through the standard library's `logging`, so a program that embeds a node decides where they go;
`configure` is what the command line calls. Metrics live in a registry per node, never in a global one: two
nodes in one process do not add up. A trace id names everything that follows from one cause; it is carried in
`current_trace` inside a process and in each request's head between processes.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO, TypeVar

from lattica.errors import LocalProtocolError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["human", "json"]

_M = TypeVar("_M")

current_trace: ContextVar[str] = ContextVar("lattica_trace", default="")

# Seconds. Spans reach from one loopback round trip (60 us) to a cold load of weights.
SPAN_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


def new_trace() -> str:
    """A fresh trace id: 16 hex digits, 64 random bits, as W3C trace context has for a span."""
    return secrets.token_hex(8)


class Log:
    """A logger whose lines are an event and named fields: `log.info("peer connected", peer=peer_id)`.

    `bind` gives a log that adds the same fields to each line. Lines carry the current trace id.
    """

    __slots__ = ("_fields", "_logger")

    def __init__(self, name: str, fields: Mapping[str, object] | None = None) -> None:
        self._logger = logging.getLogger(name)
        self._fields = dict(fields or {})

    def bind(self, **fields: object) -> Log:
        """This log, with these fields on each line."""
        return Log(self._logger.name, {**self._fields, **fields})

    def debug(self, event: str, /, **fields: object) -> None:
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, error: BaseException | None = None, /, **fields: object) -> None:
        """An error line, with the traceback of `error` where there is one."""
        self._emit(logging.ERROR, event, fields, error)

    def exception(self, event: str, /, **fields: object) -> None:
        """An error line with the traceback of what is being handled, as the standard library has it."""
        self._emit(logging.ERROR, event, fields, sys.exc_info()[1])

    def _emit(
        self, level: int, event: str, fields: Mapping[str, object], error: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            # The event is an argument, not the format: a "%" that a peer sent must not be interpreted.
            self._logger.log(
                level, "%s", event, exc_info=error, extra={"fields": {**self._fields, **fields}}, stacklevel=3
            )


def _parts(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """The event and the fields of any record, also a foreign library's."""
    fields = dict(getattr(record, "fields", {}))
    if trace := current_trace.get():
        fields.setdefault("trace", trace)
    return record.getMessage(), fields


class HumanFormatter(logging.Formatter):
    """`12:03:04.123 info     lattica.node: peer connected peer=12D3... trace=5e...`"""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _parts(record)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        words = [_printable(event), *(f"{name}={_word(value)}" for name, value in fields.items())]
        milliseconds = int(record.msecs)
        line = f"{clock}.{milliseconds:03d} {record.levelname.lower():<7} {record.name}: {' '.join(words)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (unix seconds), `level`, `logger`, `event`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _parts(record)
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
        }
        for name, value in fields.items():
            line.setdefault(name, _plain(value))
        if record.exc_info:
            line["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN, and a log line must stay readable by every parser
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _word(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if not text or any(c.isspace() or c in '"=' for c in text) else _printable(text)


def _printable(text: str) -> str:
    """Text with control characters escaped: a peer's words must not move the reader's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def configure(level: LogLevel = "info", style: LogFormat = "human", *, stream: TextIO | None = None) -> None:
    """Send the log lines of this process to `stream` (stderr); replaces what was configured before.

    `level` is for our own lines; of other libraries we show warnings. py-libp2p, which logs expected failures
    as errors with a traceback, is kept quiet by `lattica.net.compat`, once it is imported.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("lattica", "lattica_infer"):
        logging.getLogger(name).setLevel(level.upper())


class Metrics:
    """One node's metrics, named `lattica_...`, in a registry of their own.

    Asking for a metric that exists gives the one that exists, so that each part may name what it counts
    where it counts it.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry  # 70 ms that no command line client should pay

        self.registry: CollectorRegistry = CollectorRegistry()
        self._known: dict[str, object] = {}

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A number that only grows; its name in the exposition ends in `_total`."""
        from prometheus_client import Counter

        return self._get(name, lambda: Counter(name, text, labels, registry=self.registry), Counter)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A number that goes up and down."""
        from prometheus_client import Gauge

        return self._get(name, lambda: Gauge(name, text, labels, registry=self.registry), Gauge)

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = SPAN_BUCKETS
    ) -> Histogram:
        """A distribution, seconds unless the name says otherwise."""
        from prometheus_client import Histogram

        return self._get(
            name, lambda: Histogram(name, text, labels, registry=self.registry, buckets=buckets), Histogram
        )

    def _get(self, name: str, make: Callable[[], _M], kind: type[_M]) -> _M:
        if name not in self._known:
            self._known[name] = make()
        known = self._known[name]
        if not isinstance(known, kind):
            raise LocalProtocolError(f"metric {name} is a {type(known).__name__}, not a {kind.__name__}")
        return known

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class span:
    """Time a piece of work: one debug line and one observation in `lattica_span_seconds`.

    The line and the histogram carry the outcome: "ok", or the class of what was raised. Nothing is caught.
    Starts a trace when there is none, so that the calls made inside can be found together.
    """

    __slots__ = ("_clock", "_fields", "_log", "_metrics", "_name", "_started", "_token")

    def __init__(
        self,
        name: str,
        *,
        log: Log,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
        **fields: object,
    ) -> None:
        self._name, self._log, self._metrics, self._clock = name, log, metrics, clock
        self._fields = fields
        self._started = 0.0
        self._token: Token[str] | None = None

    def __enter__(self) -> None:
        if not current_trace.get():
            self._token = current_trace.set(new_trace())
        self._started = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        seconds = self._clock() - self._started
        outcome = "ok" if kind is None else kind.__name__
        self._log.debug(self._name, seconds=seconds, outcome=outcome, **self._fields)
        self._metrics.histogram(
            "lattica_span_seconds", "Time that a piece of work took.", ("span", "outcome")
        ).labels(self._name, outcome).observe(seconds)
        if self._token is not None:
            current_trace.reset(self._token)
