"""PeerId and Cid against published values, and against themselves under mutation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.ids import Cid, PeerId

# libp2p peer-ids specification, test vector: Ed25519 public key and the id go-libp2p prints for it
SPEC_KEY = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


def test_peer_id_of_an_ed25519_key_carries_the_key() -> None:
    peer = PeerId.from_public_key(SPEC_KEY)
    assert str(peer).startswith("12D3KooW")
    assert peer.public_key == SPEC_KEY
    assert PeerId.parse(str(peer)) == peer


def test_peer_id_of_a_hashed_key_has_no_key_inside() -> None:
    peer = PeerId.parse("QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC")
    assert peer.public_key is None
    assert str(peer) == "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"


@pytest.mark.parametrize("text", ["", "12D3KooW", "0OIl", "12D3KooW" * 40, "/p2p/x", "é"])
def test_what_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a peer id"):
        PeerId.parse(text)


def test_cid_of_empty_content_is_blake3s_published_hash() -> None:
    cid = Cid.of(b"")
    assert cid.digest.hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert str(cid).startswith("bafkr4i")
    assert Cid.parse(str(cid)) == cid


@given(st.binary(max_size=80))
def test_random_bytes_are_a_peer_id_or_a_value_error(raw: bytes) -> None:
    try:
        peer = PeerId.from_bytes(raw)
    except ValueError:
        return
    assert PeerId.parse(str(peer)) == peer


@given(st.binary(max_size=64), st.integers(0, 58), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567AB19="))
def test_content_has_one_spelling_of_its_cid(content: bytes, at: int, letter: str) -> None:
    text = str(Cid.of(content))
    changed = text[:at] + letter + text[at + 1 :]
    try:
        parsed = Cid.parse(changed)
    except ValueError:
        return
    assert str(parsed) == changed


@given(st.text(max_size=80))
def test_random_text_is_a_cid_or_a_value_error(text: str) -> None:
    try:
        cid = Cid.parse(text)
    except ValueError:
        return
    assert str(cid) == text
