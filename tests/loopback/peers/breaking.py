"""What the tests that try to break a node share: processes, nodes of their own, and waiting with a limit."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

import lattica
from lattica.ids import PeerId

SCRIPT = Path(__file__).with_name("break_node.py")
LIMIT_SECONDS = 60  # of a test that hangs; no test's result depends on it
START_SECONDS = 30  # for a process to print its address
KIB, MIB = 1024, 1024 * 1024


@dataclass
class NodeProcess:
    """A running break_node.py."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    stdin: socket.socket

    @property
    def peer_id(self) -> PeerId:
        return PeerId.parse(self.address.rpartition("/")[2])

    @property
    def listen(self) -> str:
        """Its address without its name: where another process could listen in its place."""
        return self.address.partition("/p2p/")[0]

    @property
    def port(self) -> int:
        return int(self.address.split("/")[4])

    def signal(self, how: signal.Signals) -> None:
        os.kill(self.process.pid, how)

    def stop(self) -> None:
        """Let it leave the block of its node; does not wait for it."""
        self.stdin.close()

    def kill(self) -> float:
        """kill -9; when that was, on the machine's monotonic clock."""
        at = time.monotonic()
        self.signal(signal.SIGKILL)
        return at


@contextmanager
def node_process(
    folder: Path,
    *,
    listen: str = "/ip4/127.0.0.1/tcp/0",
    bootstrap: Sequence[str] = (),
    intervals: dict[str, float] | None = None,
) -> Iterator[NodeProcess]:
    """Run break_node.py with its key and its log in `folder`; `intervals`: "module:NAME" to seconds."""
    words = [sys.executable, str(SCRIPT), "--data", str(folder / "data"), "--listen", listen]
    words += [word for address in bootstrap for word in ("--bootstrap", address)]
    words += [word for name, value in (intervals or {}).items() for word in ("--set", f"{name}={value}")]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    ours, theirs = socket.socketpair()
    with log.open("ab") as errors:
        process = subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=errors)
    theirs.close()
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if ready else b""
        assert line, f"no address within {START_SECONDS} s:\n{log.read_text()[-5000:]}"
        yield NodeProcess(process, json.loads(line)["address"], log, ours)
    finally:
        ours.close()
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)  # whatever the test did to it
        try:
            process.wait(timeout=10)
        finally:
            process.kill()
            process.stdout.close()


@asynccontextmanager
async def restarted(folder: Path, server: NodeProcess) -> AsyncIterator[NodeProcess]:
    """A killed server's process anew: its key, its address. The nodes of this process go on while it starts."""
    await trio.to_thread.run_sync(server.process.wait)
    starting = node_process(folder, listen=server.listen)
    again = await trio.to_thread.run_sync(starting.__enter__)
    try:
        assert again.address == server.address
        yield again
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(starting.__exit__, None, None, None)


@asynccontextmanager
async def open_client(*servers: NodeProcess, bootstrap: Sequence[str] = ()) -> AsyncIterator[lattica.Node]:
    """A node in this process, connected to the servers; the block has LIMIT_SECONDS."""
    config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=bootstrap)
    with trio.fail_after(LIMIT_SECONDS):
        async with lattica.open_node(config) as node:
            for server in servers:
                await node.connect(server.address)
            yield node


async def until(true: Callable[[], Awaitable[object]], *, seconds: float = 20) -> None:
    """Ask again until the answer is true: what another process counts sets no event in this one."""
    with trio.fail_after(seconds):
        while not await true():  # noqa: ASYNC110  # nothing in this process could set an event
            await trio.sleep(0.02)


@contextmanager
def takes_at_most(seconds: float) -> Iterator[None]:
    """Assert that the block ends in time; it is not cut off, so that the failure shows what it took."""
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took <= seconds, f"took {took:.2f} s, allowed are {seconds} s"
