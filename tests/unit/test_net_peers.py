from __future__ import annotations

from lattica.ids import PeerId
from lattica.net import peers
from lattica.net.peers import PeerTable


def peer(number: int) -> PeerId:
    return PeerId.from_public_key(number.to_bytes(32, "big"))


ADA, BEN = peer(1), peer(2)
HERE, THERE = "/ip4/192.0.2.1/tcp/4001", "/ip4/192.0.2.2/tcp/4001"


def test_a_peer_is_listed_while_it_is_connected() -> None:
    table = PeerTable()
    table.learn(ADA, [HERE])
    assert table.peers(now=0) == []
    table.connected(ADA, address=HERE, inbound=False, now=1)
    assert [found.peer_id for found in table.peers(now=2)] == [ADA]
    table.disconnected(ADA, now=3)
    assert table.peers(now=4) == []
    assert table.addresses(ADA) == [HERE]


def test_there_is_no_rtt_before_the_first_ping_and_a_smoothed_one_later() -> None:
    table = PeerTable()
    table.connected(ADA, address=HERE, inbound=False, now=0)
    assert table.peers(now=0)[0].rtt is None
    table.pinged(ADA, 0.100, now=1)
    assert table.peers(now=1)[0].rtt == 0.100
    table.pinged(ADA, 0.180, now=2)
    assert round(table.peers(now=2)[0].rtt or 0, 6) == 0.110


def test_seen_counts_from_the_last_sign_of_life() -> None:
    table = PeerTable()
    table.connected(ADA, address=HERE, inbound=True, now=10)
    assert table.peers(now=14)[0].seen == 4
    table.pinged(ADA, 0.1, now=15)
    assert table.peers(now=16)[0].seen == 1
    table.heard(ADA, at=19)
    table.heard(ADA, at=17)
    assert table.peers(now=20)[0].seen == 1


def test_the_address_that_worked_is_tried_first() -> None:
    table = PeerTable()
    table.learn(ADA, [HERE, THERE])
    table.connected(ADA, address=THERE, inbound=False, now=0)
    table.identified(ADA, agent="a", protocols=(), addresses=("/ip4/10.0.0.1/tcp/1", THERE), now=0)
    assert table.addresses(ADA) == [THERE, "/ip4/10.0.0.1/tcp/1"]


def test_the_port_that_a_peer_dialled_from_is_not_where_to_dial_it() -> None:
    table = PeerTable()
    table.connected(ADA, address="/ip4/192.0.2.1/tcp/55555", inbound=True, now=0)
    assert table.addresses(ADA) == []
    table.identified(ADA, agent="a", protocols=("/x",), addresses=(HERE,), now=0)
    assert table.addresses(ADA) == [HERE]
    assert table.peers(now=0)[0].addresses == (HERE,)


def test_a_new_connection_forgets_the_rtt_of_an_old_one() -> None:
    table = PeerTable()
    table.connected(ADA, address=HERE, inbound=False, now=0)
    table.pinged(ADA, 0.5, now=0)
    table.disconnected(ADA, now=1)
    table.connected(ADA, address=THERE, inbound=False, now=2)
    assert table.peers(now=2)[0].rtt is None


def test_addresses_of_a_peer_are_bounded_and_the_newest_stay() -> None:
    table = PeerTable()
    for port in range(100):
        table.learn(ADA, [f"/ip4/192.0.2.1/tcp/{port}"])
    assert len(table.addresses(ADA)) == peers.MAX_ADDRESSES
    assert table.addresses(ADA)[0] == "/ip4/192.0.2.1/tcp/99"


def test_unconnected_peers_are_bounded_and_connected_ones_stay() -> None:
    table = PeerTable()
    table.connected(BEN, address=HERE, inbound=True, now=0)
    for number in range(10, 10 + peers.MAX_PEERS_KNOWN + 50):
        table.learn(peer(number), [HERE])
    assert table.is_connected(BEN)
    assert table.addresses(peer(10)) == []
    assert table.addresses(peer(10 + peers.MAX_PEERS_KNOWN + 49)) == [HERE]
    assert len(table._entries) == peers.MAX_PEERS_KNOWN + 1


def test_news_of_a_peer_that_left_does_not_bring_it_back() -> None:
    table = PeerTable()
    table.connected(ADA, address=HERE, inbound=True, now=0)
    table.disconnected(ADA, now=1)
    table.pinged(ADA, 0.1, now=2)
    table.identified(ADA, agent="a", protocols=(), addresses=(), now=2)
    assert table.peers(now=3) == []
