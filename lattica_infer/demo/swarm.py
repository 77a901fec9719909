"""A swarm of real node processes on this machine, for the demo and the benches.

Each process is `lattica node start` as a user would run it, in a data folder of its own, reached over its control
socket. Links are delayed by putting a `DelayProxy` in front of each listening port and announcing the proxy's
port only: whoever dials a peer dials its proxy. Nothing leaves 127.0.0.1.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lattica.control import ControlClient, open_client
from lattica.errors import LatticaError
from lattica.testing import DelayProxy

_READY_SECONDS = 120.0  # five interpreters that load libp2p and torch from a cold disk on two slow cores
_STOP_SECONDS = 5.0  # from SIGTERM until SIGKILL
_LOG_TAIL_BYTES = 2000  # of a process that died, shown to the user


class SwarmError(LatticaError):
    """A process of the swarm did not start, or ended before its time."""


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """One running node: what it is for, who it is, where it is dialled, where its control socket is found."""

    role: str
    data_dir: Path
    peer_id: str
    address: str
    pid: int

    def control(self) -> AbstractAsyncContextManager[ControlClient]:
        """A connection to this node's control socket, to be used as a context manager."""
        return open_client(self.data_dir)


@asynccontextmanager
async def open_node_process(
    role: str, folder: Path, *, bootstrap: Sequence[str] = (), link_seconds: float = 0.0
) -> AsyncIterator[NodeProcess]:
    """Start `lattica node start` in `folder/role`; enters when it serves, ends it on the way out.

    Args:
        bootstrap: addresses to join by.
        link_seconds: one-way delay of every connection to this node, both directions.

    Raises:
        SwarmError: the process ended before it served, with the end of its log.
    """
    data_dir = folder / role
    data_dir.mkdir()
    reserved = _reserve_port()
    port = reserved.getsockname()[1]
    async with _proxy(port, link_seconds) as announced:
        command = [sys.executable, "-P", "-m", "lattica_infer.demo.child", "--data", str(data_dir), "--json"]
        command += ["--listen", f"/ip4/127.0.0.1/tcp/{port}", "--announce", f"/ip4/127.0.0.1/tcp/{announced}"]
        for address in bootstrap:
            command += ["--bootstrap", address]
        log = data_dir / "log"
        with log.open("wb") as stderr:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends its children in order.
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        try:
            ready = await _ready_line(process, role, log)
            reserved.close()
            yield NodeProcess(role, data_dir, ready["peer_id"], ready["addresses"][0], process.pid)
        finally:
            reserved.close()
            await _stop(process)


@asynccontextmanager
async def _proxy(port: int, link_seconds: float) -> AsyncIterator[int]:
    if link_seconds <= 0:
        yield port
        return
    async with DelayProxy("127.0.0.1", port, one_way_seconds=link_seconds) as proxy:
        yield proxy.port


def _reserve_port() -> socket.socket:
    """A port that nobody else is given: bound, not listening.

    Linux lets a second socket bind it as long as both have SO_REUSEADDR and none listens yet, so the node can
    take it over while no other program gets it by chance.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


async def _ready_line(process: trio.Process, role: str, log: Path) -> dict[str, Any]:
    """What the node says of itself once it serves: the first line on its stdout."""
    assert process.stdout is not None
    line = bytearray()
    with trio.move_on_after(_READY_SECONDS):
        while b"\n" not in line:
            chunk = await process.stdout.receive_some()
            if not chunk:
                break
            line += chunk
    first, newline, _ = bytes(line).partition(b"\n")
    if not newline:
        tail = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        raise SwarmError(f"the {role} process did not start: {tail or 'it wrote nothing'}")
    ready: dict[str, Any] = json.loads(first)
    return ready


async def _stop(process: trio.Process) -> None:
    """SIGTERM, then SIGKILL for whoever does not listen. Runs to its end also when we are cancelled."""
    with trio.CancelScope(shield=True):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with trio.move_on_after(_STOP_SECONDS):
                await process.wait()
        if process.poll() is None:
            process.kill()
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                await pipe.aclose()
