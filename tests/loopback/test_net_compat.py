"""What libp2p 0.8.1 gets wrong, tried on our host: `lattica.net.compat` lists where each is dealt with."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from lattica.errors import ConfigError, RemoteProtocolError, StreamError
from lattica.net import compat
from lattica.net.api import Stream
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def two_hosts(*, max_connections: int = 512) -> AsyncIterator[tuple[MeshHost, MeshHost]]:
    async with (
        open_host(identity=Identity.generate(), listen=[LOOPBACK], max_connections=max_connections) as server,
        open_host(identity=Identity.generate(), listen=[LOOPBACK]) as client,
    ):
        with trio.fail_after(20):
            await client.connect(server.addresses[0])
            yield server, client


async def answer(stream: Stream) -> None:
    await stream.send_all(b"here")


def test_another_libp2p_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "VERSION", "9.9.9")
    with pytest.raises(ConfigError, match=r"libp2p 0\.8\.1 is installed.*9\.9\.9"):
        compat.require_version()


async def test_a_host_does_not_open_with_another_libp2p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "VERSION", "9.9.9")
    with pytest.raises(ConfigError, match=r"pip install libp2p==9\.9\.9"):
        async with open_host(identity=Identity.generate(), listen=[]):
            pass


def test_libp2p_logs_nothing_that_is_not_critical_and_no_handler_of_its_own() -> None:
    code = """
import logging, trio
from libp2p.network.connection import swarm_connection
from lattica.net.host import open_host
from lattica.net.identity import Identity
async def main():
    async with open_host(identity=Identity.generate(), listen=[]): pass
trio.run(main)
swarm_connection.logging.debug("expected")
swarm_connection.logging.warning("expected")
logging.getLogger("libp2p.network.auto_connector").error("expected")
logging.getLogger("libp2p.host.basic_host").error("expected")
assert not logging.root.handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


async def test_inbound_slots_are_given_back() -> None:
    """swarm.py:1982 never does, so that the fourth connection in the life of this host would be refused."""
    async with two_hosts(max_connections=3) as (server, client):
        for _ in range(10):
            await client.disconnect(server.peer_id)
            await client.connect(server.addresses[0])
            await client.ping(server.peer_id)


@pytest.mark.parametrize("error", [ValueError("bug"), StreamError("broken"), RemoteProtocolError("bad")])
async def test_a_handler_that_raises_costs_its_stream_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Stream) -> None:
        raise error

    async with two_hosts() as (server, client):
        server.serve("/lattica/answer", answer)
        server.serve("/lattica/fail", fail)
        for _ in range(3):
            with pytest.raises(StreamError):
                await (await client.open_stream(server.peer_id, ["/lattica/fail"])).receive_some()
            stream = await client.open_stream(server.peer_id, ["/lattica/answer"])
            assert await stream.receive_some() == b"here"
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == (3 if isinstance(error, ValueError) else 0)  # a bug is told, a peer's leaving is not


async def test_a_handler_that_returns_without_closing_ends_its_stream() -> None:
    async with two_hosts() as (server, client):
        server.serve("/lattica/answer", answer)
        stream = await client.open_stream(server.peer_id, ["/lattica/answer"])
        assert await stream.receive_some() == b"here"
        assert await stream.receive_some() == b""


async def test_an_endless_protocol_name_is_broken_off() -> None:
    async with two_hosts() as (server, client):
        (connection,) = client.connections(server.peer_id)
        stream = connection.open_now()
        with pytest.raises(StreamError):
            await stream.send_all(b"\xff\xff\xff\x7f" + bytes(8 << 20))
        assert await client.ping(server.peer_id) > 0


async def test_nobody_is_dialled_unasked() -> None:
    """libp2p dials whoever it has heard of."""
    async with two_hosts() as (server, client):
        async with open_host(identity=Identity.generate(), listen=[]) as third:
            third.add_addresses(server.peer_id, server.addresses)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert third.peers() == []
        assert [peer.peer_id for peer in server.peers()] == [client.peer_id]


def test_a_host_changes_nothing_of_the_library() -> None:
    code = """
import trio, libp2p
from libp2p.network.swarm import Swarm
from libp2p.host.basic_host import BasicHost
before = dict(vars(Swarm)), dict(vars(BasicHost))
from lattica.net.host import open_host
from lattica.net.identity import Identity
async def main():
    async with open_host(identity=Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]): pass
trio.run(main)
assert before == (dict(vars(Swarm)), dict(vars(BasicHost)))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
