"""Records between nodes: put, found, replaced, ended - and never believed without a signature."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import lattica
from lattica import protocols
from lattica.dht.records import sign
from lattica.net.identity import Identity
from lattica.node import Node
from lattica.rpc.service import Call, Service
from lattica.testing import MemoryHost, MemoryNetwork, endpoint

NOW = 1_800_000_000.0


@dataclass
class WallClock:
    """Unix seconds that go with trio's clock, and can be set."""

    offset: float = field(default_factory=lambda: NOW - trio.current_time())

    def __call__(self) -> float:
        return trio.current_time() + self.offset


@dataclass
class Mesh:
    """A keeper, and Ada and Bob who put to it."""

    network: MemoryNetwork
    clock: WallClock
    keeper: Node
    ada: Node
    bob: Node


@asynccontextmanager
async def a_mesh() -> AsyncIterator[Mesh]:
    async with MemoryNetwork(seed=1, latency=0.01) as network:
        clock = WallClock()
        async with lattica.open_node(network=network, clock=clock) as keeper:
            config = lattica.NodeConfig(bootstrap=keeper.addresses)
            async with (
                lattica.open_node(config, network=network, clock=clock) as ada,
                lattica.open_node(config, network=network, clock=clock) as bob,
            ):
                yield Mesh(network, clock, keeper, ada, bob)


async def test_what_one_puts_another_finds(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        assert await mesh.ada.dht.put("jobs/today", b"v", ttl=600) == 1
        record = await mesh.bob.dht.get("jobs/today", author=mesh.ada.peer_id)
        assert (record.value, record.author) == (b"v", mesh.ada.peer_id)
        assert record.expires == pytest.approx(mesh.clock() + 600, abs=1)
        assert (await mesh.keeper.dht.get("jobs/today", author=str(mesh.ada.peer_id))) == record


async def test_a_first_node_counts_itself(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        assert await mesh.keeper.dht.put("k", b"v") == 1
        assert (await mesh.ada.dht.get("k")).author == mesh.keeper.peer_id


async def test_a_later_put_replaces_an_earlier_one(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        for value in (b"one", b"two", b"three"):
            await mesh.ada.dht.put("k", value)
        assert [record.value for record in await mesh.bob.dht.get_all("k")] == [b"three"]


async def test_authors_and_subkeys_are_all_found(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        await mesh.ada.dht.put("k", b"1")
        await mesh.ada.dht.put("k", b"2", subkey="x")
        await mesh.bob.dht.put("k", b"3")
        found = {(r.author, r.subkey): r.value for r in await mesh.bob.dht.get_all("k")}
        ada, bob = mesh.ada.peer_id, mesh.bob.peer_id
        assert found == {(ada, ""): b"1", (ada, "x"): b"2", (bob, ""): b"3"}
        assert (await mesh.bob.dht.get("k", author=ada, subkey="x")).value == b"2"


async def test_a_record_ends(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        await mesh.ada.dht.put("k", b"v", ttl=60)
        await trio.sleep(59)
        assert await mesh.bob.dht.get("k")
        await trio.sleep(2)
        with pytest.raises(lattica.NotFoundError, match="no record 'k'"):
            await mesh.bob.dht.get("k")
        assert await mesh.bob.dht.get_all("k") == []


async def test_a_restarted_author_whose_clock_went_back_is_still_heard(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        identity = Identity.generate()
        ahead = sign(
            identity, "k", b"old", sequence=int((NOW + 100) * 1000), expires_ms=int((NOW + 200) * 1000)
        )
        await mesh.bob.endpoint(protocols.RECORDS).call(mesh.keeper.peer_id, "records.put", ahead.to_bytes())
        mesh.ada.dht._identity = identity
        assert await mesh.ada.dht.put("k", b"new") == 1
        assert (await mesh.bob.dht.get("k")).value == b"new"


async def test_without_a_keeper_it_is_an_error_that_says_why(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        mesh.network.partition([mesh.keeper.peer_id], [mesh.ada.peer_id])
        with pytest.raises(lattica.RecordError, match=r"nobody keeps the record 'k': .*10 s"):
            await mesh.ada.dht.put("k", b"v")
        with pytest.raises(lattica.RecordError, match="no peer could be asked"):
            await mesh.ada.dht.get_all("k")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"value": bytes(protocols.MAX_RECORD_VALUE_BYTES + 1)}, "put a Cid into it"),
        ({"key": ""}, "1 to 256"),
        ({"ttl": 0}, "ttl 0 s"),
        ({"ttl": 48 * 3600 + 1}, "ttl 172801 s"),
        ({"ttl": float("nan")}, "ttl nan"),
    ],
)
async def test_what_is_over_a_bound_is_refused_here(
    arguments: dict[str, Any], reason: str, autojump_clock: MockClock
) -> None:
    async with a_mesh() as mesh:
        with pytest.raises(lattica.RecordError, match=reason):
            await mesh.ada.dht.put(**{"key": "k", "value": b"v", **arguments})


@pytest.mark.parametrize("raw", [b"", b"garbage", bytes(20_000), "text", None, 7])
async def test_a_keeper_survives_garbage(raw: object, autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        rpc = mesh.bob.endpoint(protocols.RECORDS)
        with pytest.raises(lattica.RemoteError) as caught:
            await rpc.call(mesh.keeper.peer_id, "records.put", raw)
        assert caught.value.code == "RecordError"
        assert await mesh.ada.dht.put("k", b"v") == 1


async def test_a_forged_record_is_not_kept(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        true = sign(mesh.ada.identity, "k", b"v", sequence=1, expires_ms=int((NOW + 60) * 1000))
        forged = true.to_bytes().replace(b"\xc4\x01v", b"\xc4\x01w")
        with pytest.raises(lattica.RemoteError, match="signature"):
            await mesh.bob.endpoint(protocols.RECORDS).call(mesh.keeper.peer_id, "records.put", forged)
        assert await mesh.bob.dht.get_all("k") == []


class Liar:
    """A keeper that answers `records.get` with whatever it is given."""

    def __init__(self, host: MemoryHost) -> None:
        self.answer: object = []
        service = Service("records")
        service.add("get", self._get)
        endpoint(host, protocols.RECORDS).register(service)

    async def _get(self, call: Call, key: str, author: object, subkey: object) -> object:
        return self.answer


async def test_a_lying_keeper_harms_nobody_who_also_asks_an_honest_one(autojump_clock: MockClock) -> None:
    """Forged, ended, foreign and garbled records are left out; the honest keeper's is found."""
    async with a_mesh() as mesh:
        host = mesh.network.host("liar")
        liar = Liar(host)
        config = lattica.NodeConfig(bootstrap=[*mesh.keeper.addresses, *host.addresses])
        await mesh.ada.dht.put("k", b"true")
        true = await mesh.ada.dht.get("k")
        late = sign(Identity.generate(), "k", b"late", sequence=9, expires_ms=int(NOW * 1000) - 1)
        foreign = sign(Identity.generate(), "other", b"foreign", sequence=9, expires_ms=true.expires_ms)
        forged = true.to_bytes().replace(b"\xc4\x04true", b"\xc4\x04fake")
        async with lattica.open_node(config, network=mesh.network, clock=mesh.clock) as node:
            for answer in (
                [forged, late.to_bytes(), foreign.to_bytes(), b"garbage", 7],
                "no list",
                [b""] * 513,
            ):
                liar.answer = answer
                assert await node.dht.get_all("k") == [true]
                assert await node.dht.get("k") == true


async def test_the_newest_of_several_keepers_wins(autojump_clock: MockClock) -> None:
    async with a_mesh() as mesh:
        host = mesh.network.host("stale")
        liar = Liar(host)
        config = lattica.NodeConfig(bootstrap=[*host.addresses, *mesh.keeper.addresses])
        await mesh.ada.dht.put("k", b"old")
        liar.answer = [(await mesh.ada.dht.get("k")).to_bytes()]
        await mesh.ada.dht.put("k", b"new")
        async with lattica.open_node(config, network=mesh.network, clock=mesh.clock) as node:
            assert [record.value for record in await node.dht.get_all("k")] == [b"new"]
