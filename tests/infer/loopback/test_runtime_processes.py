"""Shards, coordinators and commands as processes of their own, over libp2p on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import lattica
import lattica_infer
from lattica_infer.model.text import Tokenizer

LISTEN = "/ip4/127.0.0.1/tcp/0"


@pytest.fixture
def environment(tmp_path: Path, repository: Path) -> dict[str, str]:
    """Of the processes: models of their own, and our entry points also where the package is not installed."""
    paths = [str(repository)]
    if not entry_points(group="lattica.services", name="infer"):
        settings = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["entry-points"]
        installed = tmp_path / "packages" / "lattica_mesh-0.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lattica-mesh\nVersion: 0\n")
        (installed / "entry_points.txt").write_text(
            "\n".join(
                f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
                for group, entries in settings.items()
            )
        )
        paths.append(str(installed.parent))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LATTICA_CACHE_DIR": str(tmp_path / "cache")}


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """`run("model", "ls")`: one command to its end."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lattica", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return command


@contextmanager
def process(environment: dict[str, str], *arguments: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A command that goes on; it and the JSON line that it says when it is ready. Ends with SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-m", "lattica", *arguments, "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        try:
            assert running.stdout is not None
            yield running, json.loads(running.stdout.readline())
        finally:
            running.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_two_processes_serve_and_a_third_generates(
    environment: dict[str, str], run: Run, tiny_model: Path, greedy: Any, tmp_path: Path
) -> None:
    folders = [str(tmp_path / name) for name in ("first", "second", "asker")]
    imported = run("model", "import", str(tiny_model), "--name", "tiny", "--json")
    assert (imported.returncode, json.loads(imported.stdout)["layers"]) == (0, 5), imported.stderr
    assert [model["name"] for model in json.loads(run("model", "ls", "--json").stdout)] == ["tiny"]

    start = ("node", "start", "--listen", LISTEN, "--data")
    with process(environment, *start, folders[0]) as (_, first):
        bootstrap = ("--bootstrap", first["addresses"][0])
        with (
            process(environment, *start, folders[1], *bootstrap) as (_, second),
            process(environment, *start, folders[2], *bootstrap),
            process(environment, "shard", "serve", "tiny", "--layers", "0:2", "--data", folders[0]) as (
                serving,
                told,
            ),
        ):
            assert (told["layers"], told["peer_id"]) == ([0, 2], first["peer_id"])
            detached = run(
                "shard", "serve", "tiny", "--layers", "2:5", "--detach", "--json", "--data", folders[1]
            )
            assert (detached.returncode, json.loads(detached.stdout)["layers"]) == (0, [2, 5]), (
                detached.stderr
            )

            shards = json.loads(run("shards", "--json", "--data", folders[2]).stdout)
            assert [(row["layers"], row["peer_id"]) for row in shards] == [
                ([0, 2], first["peer_id"]),
                ([2, 5], second["peer_id"]),
            ]
            generate = ("generate", "tiny", "The mesh wakes", "--raw", "--max-tokens", "24", "--data")
            answer = run(*generate, folders[2], "--json")
            assert answer.returncode == 0, answer.stderr
            result = json.loads(answer.stdout)
            prompt = Tokenizer(tiny_model).encode("The mesh wakes")
            assert result["tokens"] == greedy(prompt, 24)
            assert (result["stats"]["tokens"], result["stats"]["finish"]) == (24, "length")
            # A shard's own node asks as well as any other, and for people the text alone is on stdout.
            assert run(*generate, folders[1]).stdout == result["text"] + "\n"
            peers = json.loads(run("peers", "--json", "--data", folders[2]).stdout)
            assert {"tiny 0:2", "tiny 2:5"} <= {name for peer in peers for name in peer["serves"]}

            # The shard ends with its command; what is missing then is named.
            serving.send_signal(signal.SIGINT)
            serving.wait(timeout=30)
            gone = run(*generate, folders[2], "--timeout", "2")
            assert (gone.returncode, gone.stdout) == (1, "")
            assert "layers 0-1 have no live shard" in gone.stderr
            assert '"lattica shard serve tiny --layers 0:2"' in gone.stderr


@pytest.mark.slow
async def test_a_shard_that_is_killed_ends_the_generation_in_seconds(
    environment: dict[str, str], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(make_tiny_model(max_position_embeddings=8192))
    data = str(tmp_path / "shard")
    # One process keeps the records and serves the end of the model; it is ready before our own node starts,
    # because reading what a process says keeps this thread busy.
    with (
        process(environment, "node", "start", "--listen", LISTEN, "--data", data) as (running, told),
        process(environment, "shard", "serve", model, "--layers", "2:5", "--data", data),
    ):
        config = lattica.NodeConfig(listen=[LISTEN], bootstrap=told["addresses"])
        async with (
            lattica.open_node(config) as node,
            lattica_infer.serve_shard(node, model, range(2)),
            lattica_infer.open_model(node, model) as mesh,
        ):
            killed = Killed(running)
            with pytest.raises(lattica_infer.ShardLostError, match="layers 2-4") as caught:
                await killed.generate(mesh)
            assert str(caught.value.peer) == told["peer_id"]
            assert killed.received >= 3
            assert time.monotonic() - killed.at < 5


class Killed:
    """A generation in which a process is killed after the third token."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.received = 0
        self.at = 0.0

    async def generate(self, mesh: Any) -> None:
        async with mesh.generate([5, 9, 13], max_tokens=8000, drafter="none") as stream:
            async for _ in stream:
                self.received += 1
                if self.received == 3:
                    self.at = time.monotonic()
                    self._process.kill()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (
            ("shard", "serve", "{model}", "--layers", "3:9"),
            2,
            "layers 3:9 of tiny don't exist: it has 5 layers",
        ),
        (("shard", "serve", "{model}", "--layers", "5"), 2, "layers '5' are no range: write 0:10"),
        (("shard", "serve", "nothing", "--layers", "0:1"), 1, "no model 'nothing'"),
        (("shard", "serve", "{model}", "--layers", "0:1"), 3, "no node is running on"),
        (("generate", "{model}", "hello"), 3, "no node is running on"),
        (("model", "import", "nothing"), 1, "no source 'nothing'"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_its_exit_code(
    arguments: tuple[str, ...], code: int, reason: str, run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    filled = [argument.format(model=tiny_model) for argument in arguments]
    if filled[0] != "model":
        filled += ["--data", str(tmp_path / "node")]
    done = run(*filled)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_example_with_three_shards_runs(
    environment: dict[str, str], tiny_model: Path, repository: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(repository / "examples" / "three_shards.py"), str(tiny_model)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[:3]] == ["0-1", "2-2", "3-4"]
    assert done.stdout.splitlines()[-1].startswith("40 tokens in ")
