from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.identity.identify.pb.identify_pb2 import Identify
from multiaddr import Multiaddr

from lattica.errors import RemoteProtocolError
from lattica.net import identify
from lattica.net.identity import Identity

ALICE = Identity(bytes([1]) * 32).peer_id
BOB = Identity(bytes([2]) * 32).peer_id
HERE = "/ip4/192.0.2.1/tcp/4001"


def encoded(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "agent": "lattica/0",
        "protocols": ["/a"],
        "addresses": [HERE],
        "observed": None,
    }
    return identify.encode(ALICE, **(fields | changes))  # type: ignore[arg-type]  # a test's short hand


def raw(message: Identify) -> bytes:
    body = message.SerializeToString()
    return bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) + body


def test_a_message_says_what_was_put_in() -> None:
    data = encoded(observed=Multiaddr("/ip4/203.0.113.9/tcp/5"))
    assert identify.message_size(data) == len(data)
    assert identify.decode(ALICE, data) == identify.Description(
        agent="lattica/0", protocols=("/a",), addresses=(HERE,), observed="/ip4/203.0.113.9/tcp/5"
    )


def test_libp2p_reads_our_message_and_finds_no_empty_observed_address() -> None:
    message = parse_identify_response(encoded())
    assert message.agent_version == "lattica/0"
    assert not message.HasField("observed_addr")  # bite 5.8: go-libp2p refuses an empty one


def test_another_peers_key_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match=str(BOB)):
        identify.decode(BOB, encoded())


def test_a_size_is_known_as_soon_as_its_varint_is_there() -> None:
    data = encoded(agent="x" * 200)
    assert identify.message_size(data[:1]) is None
    assert identify.message_size(data[:2]) == len(data)


def test_a_long_message_is_refused_before_it_arrived() -> None:
    with pytest.raises(RemoteProtocolError, match="more than"):
        identify.message_size(b"\x81\x80\x04")  # 64 KiB + 1


def test_unusable_parts_are_left_out() -> None:
    message = Identify(
        agent_version="evil\x1b[2J\nagent",
        listen_addrs=[b"", b"\xff\xff", Multiaddr(f"{HERE}/p2p/{ALICE}").to_bytes()] + [b"x"] * 100,
        protocols=["/p"] * 1000,
    )
    found = identify.decode(ALICE, raw(message))
    assert found.agent == "evil[2Jagent"
    assert found.addresses == (HERE,)
    assert len(found.protocols) == identify.MAX_PROTOCOLS


def test_text_that_is_not_utf_8_is_shown_with_replacements() -> None:
    message = Identify(agent_version="agent-", protocols=["/name-"])
    found = identify.decode(ALICE, raw(message).replace(b"-", b"\xff"))
    assert (found.agent, found.protocols) == ("agent\ufffd", ("/name\ufffd",))


@pytest.mark.parametrize("name", [b"\x1b[2J", b"a\nb", b"a/unknown"])
def test_an_address_that_could_steer_a_terminal_or_reads_otherwise_is_left_out(name: bytes) -> None:
    unix = b"\x90\x03" + bytes([len(name) + 1]) + b"/" + name  # /unix, whose value is any bytes
    message = Identify(listen_addrs=[unix, Multiaddr(HERE).to_bytes()], observed_addr=unix)
    found = identify.decode(ALICE, raw(message))
    assert (found.addresses, found.observed) == ((HERE,), None)


@given(data=st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        identify.message_size(data)
    with contextlib.suppress(RemoteProtocolError):
        identify.decode(ALICE, data)


@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), length=st.floats(0, 1))
def test_a_changed_message_raises_nothing_else(at: float, value: int, length: float) -> None:
    bent = bytearray(encoded())
    bent[int(at * len(bent))] ^= value
    with contextlib.suppress(RemoteProtocolError):
        identify.decode(ALICE, bytes(bent[: int(length * len(bent))]))
