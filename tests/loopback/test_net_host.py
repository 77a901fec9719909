"""Two real processes: the peer of net_peer_process.py, and a host in the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import trio

from lattica.errors import DialError, StreamError
from lattica.ids import PeerId
from lattica.net.api import Peer, Stream
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity
from lattica.protocols import MAX_HANDSHAKES

SCRIPT = Path(__file__).with_name("net_peer_process.py")


@dataclass
class PeerProcess:
    process: subprocess.Popen[str]
    address: str

    @property
    def peer_id(self) -> PeerId:
        return PeerId.parse(self.address.rpartition("/")[2])

    @property
    def endpoint(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.address.split("/")[4])


@contextmanager
def running_peer(log: IO[str], *arguments: str) -> Iterator[PeerProcess]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield PeerProcess(process, json.loads(process.stdout.readline())["address"])
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeerProcess]:
    """One peer for all tests of the module: each of them also shows that those before left it whole."""
    path = tmp_path_factory.mktemp("peer") / "log"
    with path.open("w+") as log, running_peer(log) as found:
        yield found
    text = path.read_text()
    assert text.count("Traceback") == text.count("ValueError: a bug in a handler"), text


@asynccontextmanager
async def host_at(peer: PeerProcess | None = None) -> AsyncIterator[MeshHost]:
    async with open_host(
        identity=Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], agent="test/1"
    ) as host:
        if peer is not None:
            await host.connect(peer.address)
        with trio.fail_after(30):
            yield host


async def until(true: Callable[[], object]) -> None:
    """Real time and another process: look again until it holds, for as long as the test may take."""
    with trio.fail_after(10):
        while not true():  # noqa: ASYNC110  # nothing in this process could set an event
            await trio.sleep(0.005)


async def read_all(stream: Stream) -> bytes:
    data = bytearray()
    while more := await stream.receive_some():
        data += more
    return bytes(data)


async def echoed(host: MeshHost, peer: PeerId, data: bytes) -> bytes:
    stream = await host.open_stream(peer, ["/lattica/echo"])
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        answer = await read_all(stream)
    await stream.aclose()
    return answer


def only(peers: list[Peer]) -> Peer:
    assert len(peers) == 1
    return peers[0]


async def test_connect_lists_the_peer_at_once(peer: PeerProcess) -> None:
    async with host_at() as host:
        assert await host.connect(peer.address) == peer.peer_id
        found = only(host.peers())
        assert (found.peer_id, found.path, found.inbound) == (peer.peer_id, "direct", False)


async def test_both_sides_identify_and_ping_each_other(peer: PeerProcess) -> None:
    async with host_at(peer) as host:
        await until(lambda: only(host.peers()).agent and only(host.peers()).rtt)
        found = only(host.peers())
        assert found.agent == "peer-process/1"
        assert "/lattica/echo" in found.protocols
        assert found.addresses == (peer.address.partition("/p2p/")[0],)
        assert 0 < (found.rtt or 0) < 1


async def test_an_inbound_peer_is_identified_and_dialled_back(peer: PeerProcess) -> None:
    async with host_at() as one, host_at() as two:
        await two.connect(one.addresses[0])
        await until(lambda: only(one.peers()).agent)
        found = only(one.peers())
        assert found.inbound
        assert found.agent == "test/1"
        assert [f"{address}/p2p/{two.peer_id}" for address in found.addresses] == two.addresses
        await two.disconnect(one.peer_id)
        await until(lambda: not one.peers())
        two.serve("/lattica/hello", read_all_handler)
        await (await one.open_stream(two.peer_id, ["/lattica/hello"])).aclose()
        assert not only(one.peers()).inbound


async def read_all_handler(stream: Stream) -> None:
    await read_all(stream)


async def test_protocols_served_later_are_told(peer: PeerProcess) -> None:
    async with host_at() as one, host_at() as two:
        await two.connect(one.addresses[0])
        await until(lambda: only(two.peers()).protocols)
        one.serve("/lattica/later", read_all_handler)
        await until(lambda: "/lattica/later" in only(two.peers()).protocols)
        one.unserve("/lattica/later")
        await until(lambda: "/lattica/later" not in only(two.peers()).protocols)


async def test_ping_takes_a_round_trip(peer: PeerProcess) -> None:
    async with host_at(peer) as host:
        assert 0 < await host.ping(peer.peer_id) < 1


async def test_16_mib_come_back_through_a_half_closed_stream(peer: PeerProcess) -> None:
    data = os.urandom(1 << 20) * 16
    async with host_at(peer) as host:
        assert await echoed(host, peer.peer_id, data) == data


async def test_64_streams_run_at_once(peer: PeerProcess) -> None:
    answers: dict[int, bytes] = {}

    async def one(number: int) -> None:
        answers[number] = await echoed(host, peer.peer_id, bytes([number]) * 100_000)

    async with host_at(peer) as host, trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(one, number)
    assert answers == {number: bytes([number]) * 100_000 for number in range(64)}


@pytest.mark.parametrize("protocol", ["/lattica/value-error", "/lattica/stream-error", "/lattica/refused"])
async def test_a_failing_handler_breaks_its_stream_alone(peer: PeerProcess, protocol: str) -> None:
    async with host_at(peer) as host:
        other = await host.open_stream(peer.peer_id, ["/lattica/echo"])
        with pytest.raises(StreamError, match="reset"):
            await read_all(await host.open_stream(peer.peer_id, [protocol]))
        await other.send_all(b"still here")
        assert await other.receive_some() == b"still here"
        assert await echoed(host, peer.peer_id, b"and new ones") == b"and new ones"


async def test_a_handler_that_returns_ends_its_stream(peer: PeerProcess) -> None:
    async with host_at(peer) as host:
        assert await read_all(await host.open_stream(peer.peer_id, ["/lattica/return"])) == b"done"


async def test_the_first_protocol_that_the_peer_speaks_is_used(peer: PeerProcess) -> None:
    async with host_at(peer) as host:
        stream = await host.open_stream(peer.peer_id, ["/nobody/1", "/lattica/echo", "/lattica/hole"])
        assert stream.protocol == "/lattica/echo"
        with pytest.raises(StreamError, match="/nobody/1 or /nobody/2"):
            await host.open_stream(peer.peer_id, ["/nobody/1", "/nobody/2"])


async def test_cancelled_sends_leave_the_connection_usable(peer: PeerProcess) -> None:
    async with host_at(peer) as host:
        for _ in range(50):
            stream = await host.open_stream(peer.peer_id, ["/lattica/hole"])
            with trio.move_on_after(0.002) as scope:
                await stream.send_all(bytes(8 << 20))
            assert scope.cancelled_caught
            stream.reset()
        assert await echoed(host, peer.peer_id, b"whole") == b"whole"


async def test_a_reader_that_pauses_does_not_reset_its_writer(peer: PeerProcess) -> None:
    size = 2 << 20  # beyond the window
    async with host_at(peer) as host:
        stream = await host.open_stream(peer.peer_id, ["/lattica/late"])
        with trio.move_on_after(0.2) as scope:  # no clock decides: the window alone does
            await stream.send_all(bytes(size))
        assert scope.cancelled_caught
        stream.reset()
        stream = await host.open_stream(peer.peer_id, ["/lattica/late"])
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(bytes(size))
                await stream.send_eof()

            nursery.start_soon(send)
            await read_all(await host.open_stream(peer.peer_id, ["/lattica/let-read"]))
            assert await read_all(stream) == str(size).encode()


async def test_300_connections_one_after_the_other_are_accepted(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log, running_peer(log, "--max-connections", "20") as peer:
        async with host_at() as host:
            for _ in range(300):
                await host.connect(peer.address)
                await host.ping(peer.peer_id)
                await host.disconnect(peer.peer_id)
                assert host.peers() == []


GARBAGE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "random": os.urandom(10_000),
    "long length": b"\xff" * 5000,
    "only the greeting": b"\x13/multistream/1.0.0\n",
    "noise, then random": b"\x13/multistream/1.0.0\n\x07/noise\n" + os.urandom(5000),
    "noise, short key": b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x05hello",
    "noise, zero key": b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(32),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_on_the_port_hurts_nobody(peer: PeerProcess, data: bytes) -> None:
    async with host_at(peer) as host:
        count = MAX_HANDSHAKES + 20
        clients = [socket.create_connection(peer.endpoint) for _ in range(count)]
        for client in clients:
            client.sendall(data)
        assert await echoed(host, peer.peer_id, b"unhurt") == b"unhurt"
        async with host_at() as newcomer:
            await newcomer.connect(peer.address)
        for client in clients:
            client.close()


async def test_a_peer_without_a_free_file_says_so_and_accepts_again(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log, running_peer(log, "--more-files", "10") as peer:
        async with host_at(peer) as host:
            clients = [socket.create_connection(peer.endpoint) for _ in range(40)]
            await until(lambda: "cannot accept connections for now" in (tmp_path / "log").read_text())
            assert await echoed(host, peer.peer_id, b"unhurt") == b"unhurt"
            for client in clients:
                client.close()
            async with host_at() as newcomer:
                await until_connected(newcomer, peer.address)


async def until_connected(host: MeshHost, address: str) -> None:
    with trio.fail_after(10):
        while not host.peers():
            with contextlib.suppress(DialError):
                await host.connect(address)


async def test_a_killed_peer_is_noticed_at_once(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log, running_peer(log) as peer:
        async with host_at() as host:
            changes: list[tuple[PeerId, bool]] = []
            host.watch(lambda who, connected: changes.append((who, connected)))
            await host.connect(peer.address)
            stream = await host.open_stream(peer.peer_id, ["/lattica/hole"])
            start = trio.current_time()
            peer.process.send_signal(signal.SIGKILL)
            with pytest.raises(StreamError):
                await stream.receive_some()  # an error, never a clean end
            assert trio.current_time() - start < 1
            assert changes == [(peer.peer_id, True), (peer.peer_id, False)]
            assert host.peers() == []


async def test_a_peer_that_stops_is_noticed_and_its_last_words_arrive() -> None:
    async with host_at() as host:
        async with open_host(identity=Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as other:
            other.serve("/lattica/hole", read_all_handler)
            await host.connect(other.addresses[0])
            stream = await host.open_stream(other.peer_id, ["/lattica/hole"])
        with pytest.raises(StreamError, match="lost"):
            await stream.receive_some()
        assert host.peers() == []


async def test_a_frozen_peer_is_disconnected(
    peer: PeerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lattica.net.host.CHECK_SECONDS", 0.05)
    monkeypatch.setattr("lattica.net.connection.PING_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr("lattica.net.connection.PING_TIMEOUT_SECONDS", 0.5)
    with (tmp_path / "log").open("w+") as log, running_peer(log) as frozen:
        async with host_at(peer) as host:
            await host.connect(frozen.address)
            await until(lambda: all(found.rtt for found in host.peers()))
            os.kill(frozen.process.pid, signal.SIGSTOP)
            try:
                await until(lambda: [found.peer_id for found in host.peers()] == [peer.peer_id])
            finally:
                os.kill(frozen.process.pid, signal.SIGCONT)
