"""`lattica.portal`: a node for threads, over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

import lattica

CONFIG = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)


def worker() -> lattica.Service:
    """A service of plain functions, and some for trio."""
    service = lattica.Service("worker")

    @service.method
    def hello(call: lattica.Call, name: str) -> str:
        return f"hello {name}, says {call.local}"

    @service.method
    def count(call: lattica.Call, n: int) -> Iterator[int]:
        yield from range(n)
        raise ValueError("half way")

    @service.method
    def total(call: lattica.Call) -> int:
        return sum(call.items)  # type: ignore[call-overload, no-any-return]

    @service.method
    def doubled(call: lattica.Call) -> Iterator[int]:
        for item in call.items:  # type: ignore[attr-defined]
            yield 2 * item

    @service.method
    def thread(call: lattica.Call) -> str:
        return threading.current_thread().name

    @service.method
    def left(call: lattica.Call) -> float | None:
        return call.remaining()

    @service.method
    async def sleep(call: lattica.Call, seconds: float) -> None:
        await trio.sleep(seconds)

    return service


@pytest.fixture
def mesh() -> Iterator[tuple[Any, Any]]:
    """A client, and the server that it is connected to."""
    with lattica.portal(CONFIG) as server, lattica.portal(CONFIG) as client:
        server.rpc.register(worker())
        client.connect(server.addresses[0])
        yield client, server


def test_a_node_tells_who_and_where_it_is(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    assert server.addresses[0].endswith(str(server.peer_id))
    assert [peer.peer_id for peer in client.peers()] == [server.peer_id]
    assert server.reachability == "unknown"
    assert server.mapping == "unknown"
    assert server.config is CONFIG
    assert server.data_dir is None
    assert server.uptime_seconds > 0
    assert "worker" in server.rpc.services
    client.online(timeout=5)


def test_calls_give_values_and_the_peers_errors(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    assert client.call(server.peer_id, "worker.hello", "Ada") == f"hello Ada, says {server.peer_id}"
    assert client.rpc.call(str(server.peer_id), "worker.hello", "Ada", idempotent=True)
    with pytest.raises(lattica.NoSuchMethodError):
        client.call(server.peer_id, "worker.nothing")
    with pytest.raises(lattica.RemoteError, match="takes 1 argument, got 0"):
        client.call(server.peer_id, "worker.hello")
    with pytest.raises(lattica.LocalProtocolError, match="peer id"):
        client.call("nobody", "worker.hello")
    with pytest.raises(lattica.DialError):
        client.connect("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")


def test_streams_are_iterators(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    items = []
    with (
        client.stream(server.peer_id, "worker.count", 3) as stream,
        pytest.raises(lattica.RemoteError, match="half"),
    ):
        for item in stream:
            items.append(item)
    assert items == [0, 1, 2]
    with client.rpc.stream(server.peer_id, "worker.total") as stream:
        for number in (1, 2, 39):
            stream.send(number)
        stream.finish()
        assert stream.result() == 42
    with client.stream(server.peer_id, "worker.doubled") as stream:
        stream.send(1)
        assert next(stream) == 2
        stream.send(2)
        stream.finish()
        assert list(stream) == [4]


def test_what_a_stream_block_raises_comes_out_as_it_is(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    with pytest.raises(ZeroDivisionError), client.stream(server.peer_id, "worker.total"):
        raise ZeroDivisionError
    with pytest.raises(lattica.NoSuchMethodError), client.stream(server.peer_id, "worker.nothing") as stream:
        stream.result()
    with pytest.raises(lattica.StreamError, match="left"):
        next(stream)


def test_timeouts_end_calls_and_streams(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    with pytest.raises(lattica.DeadlineError):
        client.call(server.peer_id, "worker.sleep", 60, timeout=0.1)
    with (
        pytest.raises(lattica.DeadlineError),
        client.stream(server.peer_id, "worker.sleep", 60, timeout=0.1) as stream,
    ):
        next(stream)
    with pytest.raises(lattica.DeadlineError), client.stream(server.peer_id, "worker.total", timeout=0.1):
        time.sleep(0.2)  # the time is the block's, whoever uses it up


def test_plain_functions_run_in_threads_with_the_calls_deadline(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    assert client.call(server.peer_id, "worker.thread") == "lattica handler"
    assert 50 < client.call(server.peer_id, "worker.left", timeout=60) <= 60
    assert client.call(server.peer_id, "worker.left", timeout=None) is None


def test_a_handler_may_call_on(mesh: tuple[Any, Any]) -> None:
    """From its thread; the deadline of the call that it answers holds for the calls that it makes."""
    client, server = mesh
    relay = lattica.Service("relay")

    @relay.method
    def left(call: lattica.Call) -> float:
        return client.call(server.peer_id, "worker.left", timeout=1000)  # type: ignore[no-any-return]

    client.rpc.register(relay)
    assert server.call(client.peer_id, "relay.left", timeout=60) <= 60


def test_many_threads_call_at_once(mesh: tuple[Any, Any]) -> None:
    client, server = mesh
    with ThreadPoolExecutor(16) as threads:
        calls = [threads.submit(client.call, server.peer_id, "worker.hello", str(n)) for n in range(200)]
        assert [call.result(30).split(",")[0] for call in calls] == [f"hello {n}" for n in range(200)]


def test_records_are_put_and_got() -> None:
    with lattica.portal(CONFIG) as keeper:
        config = lattica.NodeConfig(
            listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None, bootstrap=[keeper.addresses[0]]
        )
        with lattica.portal(config) as mesh:
            mesh.online(timeout=10)
            assert mesh.dht.put("jobs/today", b"sweep", ttl=60) == 1
            assert mesh.dht.get("jobs/today", author=mesh.peer_id).value == b"sweep"
            assert [record.value for record in mesh.dht.get_all("jobs/today")] == [b"sweep"]
            with pytest.raises(lattica.NotFoundError):
                mesh.dht.get("jobs/tomorrow")


def test_what_has_no_blocking_face_is_run_on_the_node(mesh: tuple[Any, Any]) -> None:
    client, server = mesh

    async def ping(node: lattica.Node, peer: lattica.PeerId) -> float:
        return await node.host.ping(peer)

    assert client.run(ping, server.peer_id) > 0
    assert client.run(lambda node: node.peer_id) == client.peer_id
    jobs = server.endpoint("/lattica/jobs/1")
    jobs.register(worker())
    assert client.endpoint("/lattica/jobs/1").call(server.peer_id, "worker.left", timeout=None) is None


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "lattica"]


def sockets() -> int:
    """How many sockets this process has open."""
    links = (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit())
    return sum(link.startswith("socket:") for link in _existing(links))


def _existing(links: Iterator[str]) -> Iterator[str]:
    while True:
        try:
            yield next(links)
        except FileNotFoundError:  # the folder's own
            return
        except StopIteration:
            return


def test_closing_ends_the_thread_and_frees_the_sockets() -> None:
    before = sockets()
    with pytest.raises(ZeroDivisionError), lattica.portal(CONFIG):
        assert threads() == ["lattica"]
        assert sockets() > before
        raise ZeroDivisionError
    assert threads() == []
    assert sockets() == before


def test_a_node_that_cannot_start_raises_in_its_caller() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = lattica.NodeConfig(listen=[f"/ip4/127.0.0.1/tcp/{port}"], data_dir=None)
        with pytest.raises(lattica.ConfigError, match=str(port)), lattica.portal(config):
            pytest.fail("it is open")
    assert threads() == []


def test_calls_after_closing_say_so(mesh: tuple[Any, Any]) -> None:
    with lattica.portal(CONFIG) as closed:
        stream = closed.stream(mesh[1].peer_id, "worker.total")
    for call in (closed.peers, lambda: closed.call(mesh[1].peer_id, "worker.hello", "Ada"), stream.__enter__):
        with pytest.raises(lattica.LatticaError, match="closed"):
            call()
    with pytest.raises(lattica.LocalProtocolError, match="with"):
        lattica.portal(CONFIG).peers()
    with pytest.raises(lattica.LocalProtocolError, match="once"):
        closed.__enter__()


def test_closing_ends_the_calls_of_other_threads(mesh: tuple[Any, Any]) -> None:
    _, server = mesh
    asleep = threading.Event()
    service = lattica.Service("bed")

    @service.method
    async def sleep(call: lattica.Call) -> None:
        asleep.set()
        await trio.sleep_forever()

    server.rpc.register(service)
    with ThreadPoolExecutor(1) as pool:
        with lattica.portal(CONFIG) as closing:
            closing.connect(server.addresses[0])
            call = pool.submit(closing.call, server.peer_id, "bed.sleep")
            assert asleep.wait(10)
        with pytest.raises(lattica.LatticaError, match="closed"):
            call.result(10)


def test_a_node_that_fails_ends_its_block_with_the_error() -> None:
    async def fail() -> None:
        raise lattica.NetworkError("the cable is out")

    with pytest.raises(lattica.NetworkError, match="the cable is out"), lattica.portal(CONFIG) as mesh:
        mesh.run(lambda node: node._nursery.start_soon(fail))
        mesh._background.join(10)
        with pytest.raises(lattica.LatticaError, match="the cable is out"):
            mesh.peers()
    assert threads() == []


def test_a_blocking_call_on_the_nodes_own_thread_is_refused(mesh: tuple[Any, Any]) -> None:
    client, _ = mesh
    with pytest.raises(lattica.LocalProtocolError, match="own thread"):
        client.run(lambda node: client.peers())


def test_a_forked_child_is_refused(mesh: tuple[Any, Any]) -> None:
    client, _ = mesh
    child = os.fork()
    if not child:
        try:
            client.peers()
        except lattica.LocalProtocolError as error:
            os._exit(0 if "fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.peers()


async def _in_a_notebook() -> str:
    with lattica.portal(CONFIG) as server, lattica.portal(CONFIG) as client:
        server.rpc.register(worker())
        client.connect(server.addresses[0])
        await asyncio.sleep(0)
        return str(client.call(server.peer_id, "worker.hello", "Ada"))


def test_it_works_where_an_asyncio_loop_runs() -> None:
    assert asyncio.run(_in_a_notebook()).startswith("hello Ada")


SCRIPT = """
import sys, threading, lattica
config = lattica.NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"], data_dir=None)
service = lattica.Service("worker")

@service.method
async def sleep(call):
    import trio
    try:
        print("asleep", flush=True)
        await trio.sleep(600)
    finally:
        print("cancelled\\n", end="", flush=True)

"""


def start(script: str) -> subprocess.Popen[str]:
    code = SCRIPT + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_cancels_the_call_and_closes_cleanly() -> None:
    process = start("""
        with lattica.portal(config) as server:
            server.rpc.register(service)
            with lattica.portal(config) as mesh:
                mesh.connect(server.addresses[0])
                try:
                    mesh.call(server.peer_id, "worker.sleep", timeout=None)
                except KeyboardInterrupt:
                    print(f"interrupted {len(mesh.peers())}\\n", end="", flush=True)  # two threads print
                    raise
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    out, error = process.communicate(timeout=30)
    assert time.monotonic() - interrupted < 10
    assert sorted(out.splitlines()) == ["cancelled", "interrupted 1"]
    assert error.splitlines()[-1] == "KeyboardInterrupt"
    assert "Exception ignored" not in error
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_while_it_waits_for_a_stream_closes_the_stream() -> None:
    process = start("""
        with lattica.portal(config) as server, lattica.portal(config) as mesh:
            server.rpc.register(service)
            mesh.connect(server.addresses[0])
            with mesh.stream(server.peer_id, "worker.sleep") as items:
                next(items)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert out == "cancelled\n"
    assert error.splitlines()[-1] == "KeyboardInterrupt"
    assert process.returncode == -signal.SIGINT


def test_an_interpreter_that_exits_without_closing_closes_the_node(tmp_path: Path) -> None:
    process = start(f"""
        from pathlib import Path
        folder = Path({str(tmp_path)!r})
        mesh = lattica.portal(lattica.NodeConfig(listen=config.listen, data_dir=str(folder)))
        mesh.__enter__()
        print(sorted(path.name for path in folder.iterdir()), threading.active_count() > 1)
    """)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
    assert out.endswith("True\n")
    assert not list(tmp_path.glob("*.sock"))  # its control socket was there, and is gone
