"""Nodes that stop, in peace or half way through: nothing of them is left, and whoever waited for them is told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from breaking import KIB, node_process, open_client, takes_at_most, until

import lattica
from lattica.net.identity import Identity

CLOSES_SECONDS = 4.0  # the longest farewell to peers that do not answer, and the rest of stopping


def open_files() -> dict[str, str]:
    """What each descriptor of this process is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor that listed them
            continue
    return found


def held() -> tuple[dict[str, str], int, int]:
    """Open files, living tasks of this trio run, threads."""
    return open_files(), trio.lowlevel.current_statistics().tasks_living, threading.active_count()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_closing_a_node_releases_sockets_threads_and_files(tmp_path: Path) -> None:
    port = free_port()
    config = lattica.NodeConfig(
        listen=[f"/ip4/127.0.0.1/tcp/{port}"], data_dir=tmp_path / "node", metrics="127.0.0.1:0"
    )
    endless = lattica.Service("endless")
    ended: list[str] = []

    @endless.method
    async def hold(call: lattica.Call) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("hold")

    @endless.method
    async def items(call: lattica.Call):  # type: ignore[no-untyped-def]
        try:
            while True:
                yield bytes(64 * KIB)
        finally:
            ended.append("items")

    async def life() -> None:
        """A node that is left in the middle of everything: calls both ways, streams read and unread, idle ones."""
        errors: list[str] = []

        async def call(node: lattica.Node, peer: lattica.PeerId, method: str) -> None:
            with pytest.raises(lattica.NetworkError):
                await node.rpc.call(peer, method, timeout=None)
            errors.append(method)

        async def read(node: lattica.Node, peer: lattica.PeerId, stop_after: int) -> None:
            with pytest.raises(lattica.NetworkError):
                async with node.rpc.stream(peer, "endless.items") as stream:
                    for _ in range(stop_after):
                        await stream.__anext__()
                    started.set()
                    await closed.wait()
                    async for _ in stream:
                        pass
            errors.append("items")

        async with open_client() as other, trio.open_nursery() as nursery:
            other.rpc.register(endless)
            started, closed = trio.Event(), trio.Event()
            async with lattica.open_node(config) as node:
                node.rpc.register(endless_again(endless))
                await other.connect(node.addresses[0])
                nursery.start_soon(call, other, node.peer_id, "endless.hold")
                nursery.start_soon(read, other, node.peer_id, 3)
                await started.wait()
                for _ in range(5):
                    await node.rpc.call(other.peer_id, "lattica.serves")
            closed.set()
            with trio.fail_after(5):
                while len(errors) < 2:  # noqa: ASYNC110  # tasks of this run: they end by themselves
                    await trio.sleep(0.001)
        assert sorted(ended) == ["hold", "items"]
        ended.clear()

    await life()  # what is loaded and opened once
    await trio.testing.wait_all_tasks_blocked()
    before = held()
    await life()
    await trio.testing.wait_all_tasks_blocked()  # what was cancelled at the end has ended by now
    assert held() == before
    assert sorted(path.name for path in (tmp_path / "node").iterdir()) == ["identity.pem", "node.lock"]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the connections in TIME_WAIT
        sock.bind(("127.0.0.1", port))
        sock.listen()


def endless_again(service: lattica.Service) -> lattica.Service:
    """The same methods, for a second node."""
    again = lattica.Service(service.name)
    for name, method in service.methods.items():
        again.add(name, method.handler)
    return again


class CancelAfter(trio.abc.Instrument):
    """Cancels a scope at the end of the n-th step that any task takes."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if not self._left:
            self._scope.cancel()


@contextlib.asynccontextmanager
async def slow_to_start(node: lattica.Node) -> AsyncIterator[None]:
    """What a package adds to a node, with a start and a stop that take their time and hold a file and a task."""
    async with trio.open_nursery() as nursery:
        with open(os.devnull) as file:  # noqa: ASYNC230  # it is there at once
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            nursery.start_soon(trio.sleep_forever)
            yield
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            file.read()
        nursery.cancel_scope.cancel()


async def test_a_node_cancelled_at_any_step_of_starting_or_stopping_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of every task, from the first to the one after which nothing is left to cancel.

    Each turn uses the same folder and the same port, so that what one would keep the next would miss. The node's own
    start takes no step at all: it waits for nobody until the packages that add to it do.
    """
    monkeypatch.setattr("lattica.node.plugins", lambda group, log: [("slow", slow_to_start)])
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{Identity.generate().peer_id}"
    config = lattica.NodeConfig(
        listen=[f"/ip4/127.0.0.1/tcp/{free_port()}"],
        bootstrap=[nobody],
        data_dir=tmp_path / "node",
        services=True,
    )

    async def life(steps: int) -> tuple[bool, bool]:
        """Whether the node was up before the cancellation, and whether that came too late."""
        was_up = False
        with trio.CancelScope() as scope:
            instrument = CancelAfter(scope, steps)
            trio.lowlevel.add_instrument(instrument)
            try:
                async with lattica.open_node(config):
                    was_up = True
            finally:
                trio.lowlevel.remove_instrument(instrument)
        return was_up, not scope.cancel_called

    assert await life(1_000_000) == (True, True)  # what is loaded and opened once
    before = held()
    starting = stopping = 0
    for steps in range(1, 1000):
        was_up, too_late = await life(steps)
        assert held() == before, f"left behind when cancelled after step {steps}"
        assert not (tmp_path / "node" / "control.sock").exists()
        if too_late:
            break
        starting += not was_up
        stopping += was_up
    assert too_late
    assert min(starting, stopping) >= 10, "too few to have met every part"


async def test_a_dial_cancelled_at_any_step_leaves_nothing_on_either_side(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client(server) as watcher, open_client() as client:

            async def dial(steps: int) -> bool:
                """Whether the cancellation came too late."""
                with trio.CancelScope() as scope:
                    instrument = CancelAfter(scope, steps)
                    trio.lowlevel.add_instrument(instrument)
                    try:
                        await client.connect(server.address)
                    finally:
                        trio.lowlevel.remove_instrument(instrument)
                return not scope.cancel_called

            async def at_the_server() -> tuple[int, ...]:
                now = await watcher.rpc.call(server.peer_id, "break.state")
                return tuple(now[key] for key in ("peers", "sockets", "tasks"))

            assert await dial(1_000_000)
            there: tuple[int, ...] = ()

            async def alone() -> bool:
                nonlocal there
                await client.host.disconnect(server.peer_id)
                there = await at_the_server()
                return there[0] == 1

            await until(alone)
            here = held()

            async def as_before() -> bool:
                # A dial that was through when it was cancelled has left a connection, which is as good as any.
                await client.host.disconnect(server.peer_id)
                now = await at_the_server()
                files, tasks, threads = held()
                # Fewer tasks are no fault: the timer of calls runs while there are any with a deadline.
                there_too = all(map(int.__le__, now, there))
                return there_too and files == here[0] and tasks <= here[1] and threads <= here[2]

            for steps in range(1, 1000):
                too_late = await dial(steps)
                await until(as_before)  # the dial's own task ends, and the server hears of it, a moment later
                if too_late:
                    break
            assert too_late
            assert steps >= 10, "too few to have met every part"


@pytest.mark.parametrize("part", ["listen", "metrics", "control socket", "package"])
async def test_a_start_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Each part in the order in which they start; those before it are up when it fails."""

    @contextlib.asynccontextmanager
    async def broken(node: lattica.Node) -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        raise lattica.ConfigError("the package does not start")
        yield

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = [f"/ip4/127.0.0.1/tcp/{free_port()}"]
        if part == "listen":
            listen.append(f"/ip4/127.0.0.1/tcp/{port}")
        if part == "package":
            monkeypatch.setattr("lattica.node.plugins", lambda group, log: [("broken", broken)])
        if part == "control socket":
            (tmp_path / "node" / "control.sock" / "in the way").mkdir(parents=True)
        config = lattica.NodeConfig(
            listen=listen,
            data_dir=tmp_path / "node",
            metrics=f"127.0.0.1:{port}" if part == "metrics" else None,
            services=True,
        )
        before = held()
        for _ in range(3):
            with pytest.raises(lattica.ConfigError):
                async with lattica.open_node(config):
                    raise AssertionError("it started")
            assert held() == before


async def test_a_node_closes_in_time_beside_a_frozen_peer(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        before = None
        async with open_client(server) as client:
            assert await client.rpc.call(server.peer_id, "break.echo", 1) == 1
            server.signal(signal.SIGSTOP)
            with trio.move_on_after(0.2):  # bytes that nobody takes are under way
                await client.rpc.call(server.peer_id, "break.size", bytes(32 << 20))
            before = time.monotonic()
        assert time.monotonic() - before <= CLOSES_SECONDS


async def test_a_node_that_closes_ends_its_peers_calls_at_once(tmp_path: Path) -> None:
    with node_process(tmp_path) as server:
        async with open_client(server) as client:
            await client.rpc.call(server.peer_id, "break.echo", 1)
            async with trio.open_nursery() as nursery:

                async def call() -> None:
                    with pytest.raises(lattica.StreamError):
                        await client.rpc.call(server.peer_id, "break.hold", timeout=None)

                nursery.start_soon(call)
                await client.rpc.call(server.peer_id, "break.reach", "hold began", 1)
                with takes_at_most(CLOSES_SECONDS):
                    server.stop()
                    await trio.to_thread.run_sync(server.process.wait)
            assert server.process.returncode == 0
            assert client.peers() == []


@pytest.mark.parametrize("moment", ["node.lock", "control.sock", "ready"])
def test_sigterm_at_any_moment_of_node_start_ends_it_in_peace(tmp_path: Path, moment: str) -> None:
    words = [sys.executable, "-m", "lattica", "node", "start", "--json", "--data", str(tmp_path / "node")]
    words += ["--listen", f"/ip4/127.0.0.1/tcp/{free_port()}"]
    for _ in range(2):  # the second start must find folder and port free
        (tmp_path / "node" / "node.lock").unlink(
            missing_ok=True
        )  # a moment of this start, not of the one before
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            limit = time.monotonic() + 30
            if moment == "ready":
                assert process.stdout.readline()
            while moment != "ready" and not (tmp_path / "node" / moment).exists():
                assert process.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert not (tmp_path / "node" / "control.sock").exists()
