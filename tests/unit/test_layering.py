"""Who may import whom, and what must not be imported to answer a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("libp2p", "torch", "transformers", "numpy.f2py")

# Runs a command as the console script does, then tells which heavy modules it has brought in.
PROBE = f"""
import json, sys
from lattica.cli import main
sys.argv = ["lattica", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
"""

COMMANDS = [
    ("--help",),
    ("--version",),
    ("node", "--help"),
    ("node", "start", "--help"),
    ("node", "start", "--print-config"),
    ("node", "id"),
    ("node", "status"),
    ("peers",),
    ("peers", "--watch"),
    ("ping", "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"),
    ("shards",),  # from here on lattica_infer's, where it is installed
    ("model", "ls"),
    ("generate", "no-such-model", "hello"),
    ("demo", "--help"),
    ("shard", "serve", "no-such-model", "--layers", "0:1"),
]


def test_rooms_import_only_what_is_below_them(repository: Path) -> None:
    # In a process of its own: import-linter's settings of `logging` silence every logger that exists.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["lattica", "lattica_infer"])
def test_a_bare_import_is_light(module: str) -> None:
    script = f"import {module}, sys; print([name for name in {(*HEAVY, 'trio')!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_light(command: tuple[str, ...], tmp_path: Path) -> None:
    no_data = command[0].startswith("--") or command[-1] == "--help" or command[0] == "model"
    data = () if no_data else ("--data", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *command, *data], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_everything_that_is_exported_exists() -> None:
    import lattica

    assert {name for name in lattica.__all__ if getattr(lattica, name, None) is None} == set()
    assert set(lattica.__all__) <= set(dir(lattica))
    assert issubclass(lattica.errors.RecordError, lattica.LatticaError)


def test_what_is_not_built_is_absent() -> None:
    import lattica

    with pytest.raises(AttributeError, match="swarm"):
        lattica.swarm  # noqa: B018


def test_every_leaf_command_takes_data_and_json() -> None:
    """Also a package's."""
    import typer

    from lattica.cli import make_app

    def leaves(command: object, path: str) -> dict[str, set[str]]:
        children = getattr(command, "commands", None)
        if children:
            return {
                k: v for name, child in children.items() for k, v in leaves(child, f"{path} {name}").items()
            }
        params = command.params  # type: ignore[attr-defined]
        return {path: {option for param in params for option in param.opts}}

    found = leaves(typer.main.get_command(make_app()), "lattica")
    assert {path for path, options in found.items() if not {"--data", "--json"} <= options} == set()
