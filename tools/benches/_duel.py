"""Contestants in a run of their own: two processes each, jobs in turn, medians and ratios as JSON lines.

All run in one network namespace that has nothing but loopback, where such a one can be made. A job goes to one
contestant at a time, round after round, and the order turns with each round, so that a busy machine slows all of
them alike. Ratios are taken within a round; the median of them is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import bench_venvs  # tools/bench_venvs.py
import namespaces  # tools/namespaces.py

FOLDER = Path(__file__).resolve().parent / "contestants"
OURS = "lattica"
ANSWER_SECONDS = 60.0  # beyond a job's own: a contestant that hangs is left out

Line = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """Who takes part: a program of `contestants/`, the environment it needs, the jobs it can do."""

    script: Path
    works: frozenset[str]
    venv: str | None = None
    only_loopback: bool = False


def _known() -> dict[str, Contestant]:
    calls = frozenset({"calls", "items", "connect"})
    streams = frozenset({"bulk", "echo", "connect"})
    return {
        OURS: Contestant(
            FOLDER / "lattica_peer.py", calls | streams | {"beside_sending", "beside_receiving"}
        ),
        "grpc-aio": Contestant(FOLDER / "grpc_aio_peer.py", calls | {"beside_receiving"}, venv="grpc"),
        "grpc": Contestant(FOLDER / "grpc_peer.py", calls, venv="grpc"),
        "pypi-lattica": Contestant(
            FOLDER / "pypi_lattica_peer.py",
            frozenset({"calls", "items"}),  # its dial cannot be told apart from its start
            venv="pypi-lattica",
            only_loopback=True,
        ),
        "trio": Contestant(FOLDER / "trio_peer.py", streams),
        "libp2p": Contestant(FOLDER / "libp2p_peer.py", streams),
    }


KNOWN = _known()


@dataclass(frozen=True)
class Target:
    """What our figure divided by another contestant's must be; `goal` is what lies beyond."""

    against: str
    at_least: float | None = None
    at_most: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Figure:
    """One number of a job's result."""

    name: str
    unit: str
    value: Callable[[Result], float]
    targets: tuple[Target, ...] = ()
    at_most: float | None = None  # for ours alone
    compared: bool = True  # whether ratios are printed


@dataclass(frozen=True)
class Row:
    """A job, and what is read from its result."""

    name: str
    job: Line
    figures: tuple[Figure, ...]


def add_arguments(parser: argparse.ArgumentParser, *, seconds: float, rounds: int) -> None:
    """What every comparing bench takes."""
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of each job [{seconds:g}]")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of each job and contestant [{rounds}]")
    parser.add_argument("--only", help="contestants, comma between them [all that can do the job]")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=SCRIPT",
        help="another program that speaks as contestants/_lines.py says, such as one of another checkout",
    )
    parser.add_argument("--rows", help="only rows whose name contains this")


class Process:
    """One process of a contestant, spoken to in JSON lines."""

    def __init__(self, words: Sequence[str], *, prefix: Sequence[str] = ()) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [*prefix, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd=tempfile.gettempdir(),
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, line: Line, *, seconds: float = 0.0) -> Result:
        """Send a line and read the answer. Raises OSError."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()
        return self.read(seconds=seconds)

    def read(self, *, seconds: float = 0.0) -> Result:
        """The next line. Raises OSError when the process ended, or says nothing for too long."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds + ANSWER_SECONDS):
                raise OSError(f"no answer within {seconds + ANSWER_SECONDS:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise OSError(self._last_words())
        answer: Result = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        # A traceback's last line names its error; that of an exception group has a frame around it.
        named = [line.strip(" |") for line in said if re.match(r"[ |]*[\w.]+(Error|Exception|Exit)\b", line)]
        return (named or said or [f"ended with {self.process.wait()}"])[-1][:300]


@dataclass
class Running:
    """A contestant's two processes."""

    server: Process
    client: Process
    address: str
    processes: list[Process] = field(default_factory=list)

    def do(self, job: Line) -> Result:
        """One job; `cpu_seconds` of the result is both sides' together."""
        before = self.server.ask({})["cpu_seconds"]
        result = self.client.ask({"address": self.address, **job}, seconds=10 * job.get("seconds", 0.0))
        result["client_cpu_seconds"] = result["cpu_seconds"]
        result["cpu_seconds"] += self.server.ask({})["cpu_seconds"] - before
        return result

    def close(self) -> None:
        self.client.close()
        self.server.close()


def start(
    contestant: Contestant,
    python: str,
    *,
    host: str = "127.0.0.1",
    ends: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Running:
    """Start both processes. `ends` are commands that run the server's and the client's in another place."""
    server = Process([python, str(contestant.script), "serve", host], prefix=ends[0])
    client = None
    try:
        address = server.read()["address"]
        client = Process([python, str(contestant.script), "client", address], prefix=ends[1])
        client.read()
        return Running(server, client, address)
    except BaseException:
        if client is not None:
            client.close()
        server.close()
        raise


def chosen(args: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants that the command line asks for, ours first."""
    known = dict(KNOWN)
    for more in args.also:
        name, _, script = more.partition("=")
        known[name] = Contestant(Path(script).resolve(), KNOWN[OURS].works)
    if args.only is None:
        return known
    names = args.only.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"no contestant {name!r}; there are {', '.join(known)}")
    return {name: known[name] for name in known if name in names}


def interpreters(contestants: dict[str, Contestant]) -> Iterator[tuple[str, str | OSError]]:
    """For each contestant its Python, or why there is none."""
    for name, contestant in contestants.items():
        try:
            yield name, str(bench_venvs.python_with(contestant.venv)) if contestant.venv else sys.executable
        except OSError as error:
            yield name, error


def run(bench: str, args: argparse.Namespace, rows: Sequence[Row]) -> Iterator[Line]:
    """Every row: a line for each contestant and figure, then one for each ratio."""
    rows = [row for row in rows if not args.rows or args.rows in row.name]
    works = {row.job["work"] for row in rows}
    contestants = {name: one for name, one in chosen(args).items() if one.works & works}
    pythons = dict(interpreters(contestants))  # needs the network; what follows does not
    apart: OSError | None = None
    try:
        namespaces.enter_fresh()
    except OSError as error:
        apart = error
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for name, contestant in contestants.items():
            python = pythons[name]
            try:
                if isinstance(python, OSError):
                    raise python
                if contestant.only_loopback and apart is not None:
                    raise apart
                running[name] = start(contestant, python)
                stack.callback(running[name].close)
            except OSError as error:
                if name == OURS:
                    raise
                yield {"bench": bench, "contestant": name, "left_out": str(error)}
        for row in rows:
            yield from measure(bench, args, row, running, contestants)


def measure(
    bench: str,
    args: argparse.Namespace,
    row: Row,
    running: dict[str, Running],
    contestants: dict[str, Contestant],
) -> Iterator[Line]:
    """One row, all rounds. A contestant that fails is left out from then on, with its error; ours ends the run."""
    able = [name for name in running if row.job["work"] in contestants[name].works]
    results: dict[str, list[Result]] = {name: [] for name in able}
    for number in range(-1, args.rounds):  # the first one warms up and is thrown away
        shift = number % len(able) if able else 0
        for name in able[shift:] + able[:shift]:
            if name not in running:
                continue
            job = {"seconds": args.seconds if number >= 0 else args.seconds / 5, **row.job}
            try:
                result = running[name].do(job)
            except OSError as error:
                if name == OURS:
                    raise SystemExit(f"{row.name}: {error}") from error
                yield {"bench": bench, "work": row.name, "contestant": name, "left_out": str(error)}
                del running[name], results[name]
                continue
            if number >= 0:
                results[name].append(result)
    for figure in row.figures:
        yield from compare(
            {"bench": bench, "work": row.name},
            figure,
            {name: [figure.value(result) for result in some] for name, some in results.items()},
        )


def compare(head: Line, figure: Figure, values: dict[str, list[float]]) -> Iterator[Line]:
    """A line for each contestant, then our ratio to each, with the target where there is one."""
    for name, some in values.items():
        yield {
            **head,
            "contestant": name,
            "figure": figure.name,
            "unit": figure.unit,
            "value": rounded(statistics.median(some)),
            "rounds": [rounded(one) for one in some],
            **(judged(statistics.median(some), at_most=figure.at_most) if name == OURS else {}),
        }
    targets = {target.against: target for target in figure.targets}
    for name, some in values.items():
        if figure.compared and name != OURS and OURS in values:
            target = targets.get(name, Target(name))
            ratios = [ours / theirs for ours, theirs in zip(values[OURS], some, strict=True)]
            yield {
                **head,
                "figure": figure.name,
                "ratio": f"{OURS} / {name}",
                "value": rounded(statistics.median(ratios)),
                "rounds": [rounded(one) for one in ratios],
                **judged(statistics.median(ratios), target.at_least, target.at_most, target.goal),
            }


def judged(
    value: float, at_least: float | None = None, at_most: float | None = None, goal: float | None = None
) -> Line:
    """A target as it is printed, and whether the value holds it."""
    line: Line = {}
    if at_least is not None:
        line |= {"at_least": at_least, "holds": value >= at_least}
    if at_most is not None:
        line |= {"at_most": at_most, "holds": value <= at_most}
    if goal is not None:
        line["goal"] = goal
    return line


def rounded(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")


def rate(result: Result) -> float:
    """Pieces a second."""
    return float(result["pieces"] / result["seconds"])


def megabytes(result: Result) -> float:
    """MB a second; 1 MB is 10^6 bytes."""
    return float(result["bytes"] / result["seconds"] / 1e6)


def cpu_per_piece(result: Result) -> float:
    """Microseconds of both processes."""
    return float(result["cpu_seconds"] / result["pieces"] * 1e6)


def cpu_per_byte(result: Result) -> float:
    """Nanoseconds of both processes."""
    return float(result["cpu_seconds"] / result["bytes"] * 1e9)
