"""A node's data folder: made, locked by one node at a time, and asked which node that is.

The lock is the kernel's (`flock`), so it goes with the process however that ends. The lock file tells who
holds it: the process id, for messages, and where its control socket is, for the commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lattica.errors import ConfigError
from lattica.net.identity import Identity, load_or_create

KEY_FILE: Final = "identity.pem"
LOCK_FILE: Final = "node.lock"
SOCKET_FILE: Final = "control.sock"

# Bytes. The kernel takes 108 on Linux and 104 on macOS with the closing NUL; five are for the draft's name.
MAX_SOCKET_PATH: Final = 98
_MAX_LOCK_BYTES: Final = 4096  # a process id and a path


@dataclass(frozen=True, slots=True)
class Holder:
    """The node that holds a folder, or held it last."""

    pid: int
    control: Path


def load_identity(folder: Path) -> Identity:
    """The identity of the node of this folder; made with the folder where there is none. ConfigError."""
    make(folder)
    return load_or_create(folder / KEY_FILE)


def make(folder: Path) -> None:
    """Create the folder for its owner alone. ConfigError when it cannot be, or cannot be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create the data folder {folder}: {error.strerror}; name another with --data"
        ) from None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[Holder]:
    """Hold the folder for this process.

    Raises:
        ConfigError: it cannot be written, or another running node holds it.
    """
    make(folder)
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot write to the data folder {folder}: {error.strerror}; name another with --data"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = holder(folder)
            who = f"process {other.pid}" if other else "another process"
            raise ConfigError(
                f"the data folder {folder} is used by the running node of {who};"
                " stop that, or give this one a folder of its own with --data"
            ) from None
        ours = Holder(os.getpid(), socket_path(folder))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": ours.pid, "control": str(ours.control)}).encode(), 0)
        yield ours
        os.ftruncate(descriptor, 0)  # the file stays: removing it would let two nodes lock two files
    finally:
        os.close(descriptor)


def holder(folder: Path) -> Holder | None:
    """What the lock file tells; None where no node says that it runs. It may have been killed since."""
    try:
        with (folder / LOCK_FILE).open("rb") as stream:
            told = json.loads(stream.read(_MAX_LOCK_BYTES))
        return Holder(int(told["pid"]), Path(told["control"]))
    except PermissionError as error:
        raise ConfigError(f"cannot read the data folder {folder}: {error.strerror}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def socket_path(folder: Path) -> Path:
    """Where the node of this folder listens for commands: in it, or elsewhere when its path is too long."""
    inside = folder / SOCKET_FILE
    if len(os.fsencode(inside)) <= MAX_SOCKET_PATH:
        return inside
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16] + ".sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and len(os.fsencode(runtime)) + len("/lattica/") + len(name) <= MAX_SOCKET_PATH:
        return _private(Path(runtime) / "lattica") / name
    return _private(Path(f"/tmp/lattica-{os.getuid()}")) / name


def _private(folder: Path) -> Path:
    """The folder, ours and closed to others: in /tmp somebody else may have made one with this name."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"cannot create {folder} for the control socket: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{folder}, where the control socket should be, is not a folder of ours alone;"
            " remove it, or name a data folder with a shorter path"
        )
    return folder
