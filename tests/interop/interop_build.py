"""Builds the go-, rust- and js-libp2p peers that stand beside this file, once for each state of their sources.

A build lives in `$XDG_CACHE_HOME/lattica/interop` (else `~/.cache/...`), named after the hash of the sources, the
lock files and the toolchain's version. Processes that want the same build at once wait for one of them to make it.

usage: python tests/interop/interop_build.py [go] [rust] [js]
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
Say = Callable[[str], None]


class MissingToolchainError(Exception):
    """This machine lacks what building a peer takes; the message says what."""


class BuildError(Exception):
    """A peer could not be built; the message ends with what the tools said."""


@dataclass(frozen=True)
class Recipe:
    """How one language's peer is built, and run."""

    label: str
    programs: tuple[str, ...]
    version: tuple[str, ...]  # asks the first program which version it is
    at_least: tuple[int, ...]
    build: Callable[[Path, Path], None]  # from the folder of sources into an empty folder
    command: Callable[[Path], list[str]]  # that runs a build


def _build_go(source: Path, target: Path) -> None:
    _run(
        ["go", "build", "-trimpath", "-ldflags=-s -w", "-o", str(target / "peer"), "."],
        source,
        CGO_ENABLED="0",
    )


def _build_rust(source: Path, target: Path) -> None:
    kept = cache_folder() / "rust-target"  # so that a changed line does not build all of libp2p again
    _run(["cargo", "build", "--release", "--locked", "--target-dir", str(kept)], source)
    shutil.copy2(kept / "release" / "interop-peer", target / "peer")


def _build_js(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in _sources(source):
            shutil.copy2(file, folder)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], Path(folder))
        _run(["npm", "run", "build"], Path(folder))  # one file: a third of the time to start
        shutil.copy2(Path(folder) / "bundle.mjs", target / "peer.mjs")


RECIPES = {
    "go": Recipe("Go", ("go",), ("go", "version"), (1, 26), _build_go, lambda built: [str(built / "peer")]),
    "rust": Recipe(
        "Rust", ("cargo",), ("cargo", "--version"), (1, 88), _build_rust, lambda built: [str(built / "peer")]
    ),
    "js": Recipe(
        "Node.js",
        ("node", "npm"),
        ("node", "--version"),
        (20,),
        _build_js,
        lambda built: ["node", str(built / "peer.mjs")],
    ),
}


def cache_folder() -> Path:
    """Where builds live. It may be deleted at any time when no test runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lattica" / "interop"


def peer_command(language: str, say: Say) -> list[str]:
    """The command that runs a language's peer, built now if it has to be.

    Raises:
        MissingToolchainError, BuildError.
    """
    recipe, source = RECIPES[language], HERE / language
    target = cache_folder() / f"{language}-{_key(source, _require(recipe, source))}"
    with _locked(cache_folder() / f"{language}.lock"):
        if not target.exists():
            say(f"building the {language}-libp2p peer into {target} (once; a minute or two)")
            start = time.monotonic()
            draft = target.with_name(f"{language}-draft")
            shutil.rmtree(draft, ignore_errors=True)  # of a build that was broken off
            draft.mkdir()
            recipe.build(source, draft)
            draft.rename(target)
            say(f"built the {language}-libp2p peer in {time.monotonic() - start:.0f} s")
    return recipe.command(target)


def _require(recipe: Recipe, source: Path) -> str:
    """The toolchain's version, as it says it."""
    needed = f"{recipe.label} {'.'.join(map(str, recipe.at_least))} or newer"
    for program in recipe.programs:
        if shutil.which(program) is None:
            raise MissingToolchainError(f"{needed} is needed, and there is no `{program}` here")
    # Inside the sources: the version that go.mod or a toolchain file chooses.
    asked = subprocess.run(recipe.version, cwd=source, capture_output=True, text=True, check=False)
    found = re.search(r"(\d+)\.(\d+)", asked.stdout)
    if asked.returncode or found is None:
        raise MissingToolchainError(
            f"{needed} is needed; `{' '.join(recipe.version)}` fails: {asked.stderr.strip()}"
        )
    if tuple(map(int, found.groups())) < recipe.at_least:
        raise MissingToolchainError(f"{needed} is needed; this is {asked.stdout.strip()}")
    return asked.stdout


def _sources(folder: Path) -> Sequence[Path]:
    left_out = {"node_modules", "target"}  # of somebody who tried the peer by hand
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not left_out & set(file.relative_to(folder).parts)
    )


def _key(source: Path, version: str) -> str:
    key = hashlib.sha256(f"{version}\n{platform.machine()}\n".encode())
    for file in _sources(source):
        data = file.read_bytes()
        key.update(f"{file.relative_to(source)}\n{len(data)}\n".encode() + data)
    return key.hexdigest()[:16]


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"`{' '.join(command)}` failed in {folder}:\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or RECIPES:
        print(*peer_command(chosen, lambda line: print(line, file=sys.stderr)))
