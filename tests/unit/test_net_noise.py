from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.rsa import create_new_key_pair as create_rsa
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1
from libp2p.peer.id import ID
from libp2p.security.noise.pb.noise_pb2 import NoiseHandshakePayload
from noise.connection import Keypair, NoiseConnection

from lattica.errors import RemoteProtocolError
from lattica.net.identity import Identity
from lattica.net.noise import MAX_HANDSHAKE_BYTES, NoiseHandshake, NoiseSession, Secured

ALICE = Identity(bytes([1]) * 32)
BOB = Identity(bytes([2]) * 32)


def shake(initiator: NoiseHandshake, responder: NoiseHandshake) -> tuple[Secured, Secured]:
    message = initiator.start()
    while message:
        message = responder.receive(message)
        message = initiator.receive(message) if message else b""
    assert initiator.result is not None
    assert responder.result is not None
    return initiator.result, responder.result


def session(secured: Secured) -> NoiseSession:
    return NoiseSession(send_key=secured.send_key, receive_key=secured.receive_key)


def sessions() -> tuple[NoiseSession, NoiseSession]:
    keys = bytes([7]) * 32, bytes([8]) * 32
    return (
        NoiseSession(send_key=keys[0], receive_key=keys[1]),
        NoiseSession(send_key=keys[1], receive_key=keys[0]),
    )


def test_both_sides_learn_who_is_there() -> None:
    one, two = shake(
        NoiseHandshake(ALICE, initiator=True, expected=BOB.peer_id), NoiseHandshake(BOB, initiator=False)
    )
    assert (one.peer, two.peer) == (BOB.peer_id, ALICE.peer_id)
    assert session(two).receive(session(one).encrypt([b"hello"])) == [b"hello"]
    assert session(one).receive(session(two).encrypt([b"there"])) == [b"there"]


def test_the_handshake_takes_single_bytes() -> None:
    one = NoiseHandshake(ALICE, initiator=True, expected=BOB.peer_id)
    two = NoiseHandshake(BOB, initiator=False)
    towards_two, towards_one = bytearray(one.start()), bytearray()
    while towards_two or towards_one:
        if towards_two:
            towards_one += two.receive(bytes([towards_two.pop(0)]))
        else:
            towards_two += one.receive(bytes([towards_one.pop(0)]))
    assert two.result is not None
    assert two.result.peer == ALICE.peer_id


def test_bytes_behind_the_handshake_are_kept() -> None:
    one = NoiseHandshake(ALICE, initiator=True, expected=BOB.peer_id)
    two = NoiseHandshake(BOB, initiator=False)
    last = one.receive(two.receive(one.start()))
    assert one.result is not None
    two.receive(last + b"already")
    assert two.result is not None
    assert two.result.early == b"already"


def test_another_peer_than_the_expected_one_is_refused() -> None:
    one = NoiseHandshake(ALICE, initiator=True, expected=ALICE.peer_id)
    two = NoiseHandshake(BOB, initiator=False)
    with pytest.raises(RemoteProtocolError, match=str(BOB.peer_id)):
        one.receive(two.receive(one.start()))


@pytest.mark.parametrize("keys", [create_rsa(2048), create_secp256k1()], ids=["rsa", "secp256k1"])
def test_identities_of_other_key_kinds_are_proved_too(keys: KeyPair) -> None:
    static = bytes([3]) * 32
    dialer = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
    dialer.set_keypair_from_private_bytes(Keypair.STATIC, static)
    dialer.set_as_initiator()
    dialer.start_handshake()
    public = dialer.noise_protocol.keypairs["s"].public_bytes
    payload = NoiseHandshakePayload(
        identity_key=keys.public_key.serialize(),
        identity_sig=keys.private_key.sign(b"noise-libp2p-static-key:" + public),
    )
    ours = NoiseHandshake(BOB, initiator=False)
    dialer.read_message(ours.receive(framed(dialer.write_message()))[2:])
    ours.receive(framed(dialer.write_message(payload.SerializeToString())))
    assert ours.result is not None
    assert str(ours.result.peer) == str(ID.from_pubkey(keys.public_key))


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize(
    "signed", [b"noise-libp2p-static-key:" + bytes(32), b""], ids=["other key", "nothing"]
)
def test_an_identity_that_did_not_sign_the_static_key_is_refused(signed: bytes) -> None:
    dialer = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
    dialer.set_keypair_from_private_bytes(Keypair.STATIC, bytes([3]) * 32)
    dialer.set_as_initiator()
    dialer.start_handshake()
    forged = NoiseHandshakePayload(identity_key=ALICE.peer_id.multihash[2:], identity_sig=ALICE.sign(signed))
    ours = NoiseHandshake(BOB, initiator=False)
    dialer.read_message(ours.receive(framed(dialer.write_message()))[2:])
    with pytest.raises(RemoteProtocolError, match="sign"):
        ours.receive(framed(dialer.write_message(forged.SerializeToString())))


@given(data=st.binary(max_size=300), initiator=st.booleans())
def test_random_bytes_in_a_handshake_raise_nothing_else(data: bytes, initiator: bool) -> None:
    handshake = NoiseHandshake(ALICE, initiator=initiator, expected=BOB.peer_id if initiator else None)
    handshake.start()
    with contextlib.suppress(RemoteProtocolError):
        handshake.receive(data)
    assert handshake.result is None


@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), last=st.booleans())
def test_a_changed_handshake_never_succeeds(at: float, value: int, last: bool) -> None:
    one = NoiseHandshake(ALICE, initiator=True, expected=BOB.peer_id)
    two = NoiseHandshake(BOB, initiator=False)

    def bend(message: bytes) -> bytes:
        bent = bytearray(message)
        bent[int(at * len(bent))] ^= value
        return bytes(bent)

    second = two.receive(one.start())
    with contextlib.suppress(RemoteProtocolError):
        if last:
            two.receive(bend(one.receive(second)))
        else:
            one.receive(bend(second))
    assert (two if last else one).result is None


def test_a_key_of_zeros_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):  # X25519 with it gives zeros, whatever our key is
        NoiseHandshake(BOB, initiator=False).receive(framed(bytes(32)))


def test_a_long_handshake_message_is_refused_before_it_arrived() -> None:
    with pytest.raises(RemoteProtocolError, match="allowed"):
        NoiseHandshake(ALICE, initiator=False).receive((MAX_HANDSHAKE_BYTES + 1).to_bytes(2, "big"))


@given(
    pieces=st.lists(st.one_of(st.binary(max_size=50), st.integers(60_000, 140_000).map(bytes)), max_size=6),
    cuts=st.lists(st.floats(0, 1), max_size=8),
)
def test_what_is_sealed_arrives_whole_however_it_is_cut(pieces: list[bytes], cuts: list[float]) -> None:
    one, two = sessions()
    sealed = one.encrypt(pieces)
    ends = [int(cut * len(sealed)) for cut in sorted(cuts)] + [len(sealed)]
    received = [
        plain for start, end in itertools.pairwise([0, *ends]) for plain in two.receive(sealed[start:end])
    ]
    assert b"".join(received) == b"".join(pieces)


def test_small_pieces_share_a_record() -> None:
    one, two = sessions()
    assert two.receive(one.encrypt([b"ab", b"", b"cd"])) == [b"abcd"]


@given(
    plain=st.binary(min_size=1, max_size=200), at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255)
)
def test_a_changed_record_is_never_delivered(plain: bytes, at: float, value: int) -> None:
    one, two = sessions()
    bent = bytearray(one.encrypt([plain]))
    bent[int(at * len(bent))] ^= value
    with contextlib.suppress(RemoteProtocolError):
        assert two.receive(bytes(bent)) == []


@given(data=st.binary(max_size=500))
def test_random_records_raise_nothing_else(data: bytes) -> None:
    _, two = sessions()
    with contextlib.suppress(RemoteProtocolError):
        assert two.receive(data) == []


def test_records_before_a_broken_one_are_delivered() -> None:
    one, two = sessions()
    records = two.each(one.encrypt([b"good"]) + one.encrypt([b"bad"])[:-1] + b"?")
    assert next(records) == b"good"
    with pytest.raises(RemoteProtocolError):
        next(records)


def test_a_repeated_record_is_refused() -> None:
    one, two = sessions()
    sealed = one.encrypt([b"pay"])
    two.receive(sealed)
    with pytest.raises(RemoteProtocolError):
        two.receive(sealed)
