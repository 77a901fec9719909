"""Virtual environments for what the benches measure ourselves against: made on first use, kept in the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Exact versions, without their dependencies: what is named here is all that runs.
PINNED = {
    "grpc": ("grpcio==1.85.1", "typing_extensions==4.15.0"),
    "pypi-lattica": ("lattica==1.0.21",),
}


def python_with(name: str) -> Path:
    """The interpreter of the environment `name` of `PINNED`.

    Raises:
        OSError: it could not be made; the message is pip's last line.
    """
    wanted = PINNED[name]
    digest = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:12]
    folder = _cache() / f"bench-venv-{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    python, finished = folder / "bin" / "python", folder / "finished"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(sys.executable, "-m", "venv", str(folder))
            _run(
                str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", *wanted
            )
            finished.touch()
    return python


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise OSError(f"{' '.join(words[:4])}: {said[-1]}")


def _cache() -> Path:
    chosen = os.environ.get("LATTICA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lattica"
