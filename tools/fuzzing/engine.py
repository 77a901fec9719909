"""Runs one target: makes inputs, feeds them, and holds the decoder to what it promises.

A target's `run` takes an input and returns whether it was accepted. The documented error is its business; any
other exception, a broken assertion, too much memory or too much time is a finding. Every batch of inputs follows
from the seed, the target's name and the batch's number, so that a finding comes back whoever runs it.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import signal
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from fuzzing.mutate import Mutator

BATCH: Final = 500  # inputs that share their valid messages
_VALID: Final = 8  # valid messages a batch starts from
_KEPT: Final = 32  # messages of a batch at once: changed ones that were accepted join
_SAMPLE: Final = 50  # one input in so many is run under tracemalloc
_HANG_SECONDS: Final = 20.0  # CPU time of a batch; usual ones take under a tenth of a second
_MAX_GROWTH_BYTES: Final = 128 << 20  # of the process, over a whole run,
_MAX_GROWTH_PER_INPUT: Final = 32  # and this for each input: tracemalloc's starts and stops cost about 10
_MAX_FINDINGS: Final = 8
_HANG: Final = "hang"  # the key of its finding
_MINIMISE_RUNS: Final = 3000


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder under test.

    `valid` writes a message that must be accepted. A run may take `seconds` of CPU time, and at its peak
    `memory_bytes` and `memory_per_byte` for each byte of the input, as tracemalloc counts. `modules` are those
    whose lines `--coverage` counts.
    """

    name: str
    purpose: str
    valid: Callable[[Random], bytes]
    run: Callable[[bytes], bool]
    modules: tuple[str, ...]
    words: tuple[bytes, ...] = ()
    seconds: float = 0.1
    memory_bytes: int = 64 << 10
    memory_per_byte: int = 64
    max_bytes: int = 1 << 14


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that a decoder did not take as it should."""

    target: str
    what: str
    data: bytes


@dataclass(slots=True)
class Report:
    """What a run did.

    `peak_bytes` is the largest of the samples, `slowest_seconds` wall time of one input. `grown_bytes` is what the
    process took more at its peak than before.
    """

    target: str
    seed: int
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    slowest_seconds: float = 0.0
    grown_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


class _Hang(BaseException):
    """A batch took so long that something in it must be endless. No decoder catches it."""


def run(target: Target, *, seed: int, inputs: int | None = None, seconds: float | None = None) -> Report:
    """Feed a target until one of the bounds is reached; at least one of them must be given."""
    report = Report(target.name, seed)
    found: dict[str, Finding] = {}
    started, cpu, at_start = time.monotonic(), time.process_time(), _process_bytes()
    try:
        with _watchdog() as rearm:
            for batch in itertools.count():
                if inputs is not None and report.inputs >= inputs:
                    break
                if seconds is not None and time.monotonic() - started >= seconds:
                    break
                if len(found) >= _MAX_FINDINGS:
                    break
                rearm()
                size = BATCH if inputs is None else min(BATCH, inputs - report.inputs)
                _batch(target, Random(f"{seed} {target.name} {batch}"), size, report, found)
    except (
        _Hang
    ) as error:  # an input that never ends is the run's last; it may also be all of a batch that is slow
        found.setdefault(_HANG, Finding(target.name, f"a batch had {error}", b""))
    report.seconds = time.monotonic() - started
    report.cpu_seconds = time.process_time() - cpu
    report.grown_bytes = max(0, _process_bytes() - at_start)
    report.findings = [*found.values()]
    if report.grown_bytes > _MAX_GROWTH_BYTES + _MAX_GROWTH_PER_INPUT * report.inputs:
        what = f"the process grew by {report.grown_bytes >> 20} MiB in {report.inputs} inputs"
        report.findings.append(Finding(target.name, what, b""))
    return report


def _batch(target: Target, random: Random, size: int, report: Report, found: dict[str, Finding]) -> None:
    pool = [target.valid(random) for _ in range(min(_VALID, size))]
    mutator = Mutator(random, target.words, max_bytes=target.max_bytes)
    draw = random.random
    for index in range(size):
        is_valid = index < _VALID
        data = (
            pool[index]
            if is_valid
            else mutator.mutate(pool[int(draw() * len(pool))], pool[int(draw() * len(pool))])
        )
        report.inputs += 1
        start = time.perf_counter()
        try:
            accepted = _sampled(target, data, report) if index % _SAMPLE == _VALID else target.run(data)
            if is_valid:
                assert accepted, "a valid message was refused"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of pyo3's is no Exception
            _note(target, error, data, found)
            if isinstance(error, _Hang):
                raise
            continue
        took = time.perf_counter() - start
        report.slowest_seconds = max(report.slowest_seconds, took)
        if took > target.seconds and (cpu := _cpu_seconds(target, data)) > target.seconds:
            _note(target, AssertionError(f"{cpu:.2f} s for {len(data)} bytes"), data, found)
        if accepted:
            report.accepted += 1
            if not is_valid and len(pool) < _KEPT:
                pool.append(data)


def _sampled(target: Target, data: bytes, report: Report) -> bool:
    accepted, peak = _measured(target, data)
    allowed = target.memory_bytes + target.memory_per_byte * len(data)
    # Again when it was too much: the interpreter's table of interned strings (pathlib interns every part of a path) is
    # copied whole when it grows, and whose turn it then is has nothing to do with the input.
    if peak > allowed:
        peak = min(_measured(target, data)[1] for _ in range(2))
    report.peak_bytes = max(report.peak_bytes, peak)
    assert peak <= allowed, f"a peak of more than {allowed} bytes for an input of {len(data)}"
    return accepted


def _measured(target: Target, data: bytes) -> tuple[bool, int]:
    """Whether the input is accepted, and how many bytes were in use at most meanwhile."""
    tracemalloc.start()
    try:
        accepted = target.run(data)
        return accepted, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _cpu_seconds(target: Target, data: bytes) -> float:
    """The least of three runs, in CPU time: the machine may have been busy with others' work."""
    times = []
    for _ in range(3):
        start = time.thread_time()
        target.run(data)
        times.append(time.thread_time() - start)
    return min(times)


def _note(target: Target, error: BaseException, data: bytes, found: dict[str, Finding]) -> None:
    key = _HANG if isinstance(error, _Hang) else _place(error)
    if key in found or len(found) >= _MAX_FINDINGS:
        return
    text = "".join(traceback.format_exception(error)).rstrip()
    smallest = data if isinstance(error, _Hang) else minimise(target, data, key)
    found[key] = Finding(target.name, text, smallest)


def _place(error: BaseException) -> str:
    """Kind and place of an error: findings that share it are one."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}" if frames else str(error)[:20]


def minimise(target: Target, data: bytes, place: str) -> bytes:
    """The shortest input found by cutting pieces out of `data` that still fails in the same place."""

    def fails(candidate: bytes) -> bool:
        try:
            target.run(candidate)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return _place(error) == place
        return False

    runs = 0
    size = len(data) // 2
    while size and runs < _MINIMISE_RUNS:
        start = 0
        while start < len(data) and runs < _MINIMISE_RUNS:
            shorter = data[:start] + data[start + size :]
            runs += 1
            if fails(shorter):
                data = shorter
            else:
                start += size
        size //= 2
    return data


@contextlib.contextmanager
def _watchdog() -> Iterator[Callable[[], object]]:
    """Raise _Hang inside whatever runs once the process has used _HANG_SECONDS since the last call given."""

    def bite(*_: Any) -> None:
        raise _Hang(f"no end after {_HANG_SECONDS:.0f} s of CPU time")

    before = signal.signal(signal.SIGPROF, bite)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_PROF, _HANG_SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
