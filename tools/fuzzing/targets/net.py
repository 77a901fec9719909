"""What arrives on a connection before a stream exists: Noise, multistream-select, identify; and Yamux frames."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from random import Random
from typing import Any, Final
from unittest import mock

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p.crypto.pb.crypto_pb2 import PublicKey
from multiaddr import Multiaddr

from fuzzing import draw
from fuzzing.engine import Target
from fuzzing.snapshot import Snapshot
from lattica.errors import RemoteProtocolError
from lattica.ids import PeerId
from lattica.net import identify, multistream
from lattica.net.identity import Identity
from lattica.net.noise import MAX_HANDSHAKE_BYTES, MAX_RECORD_BYTES, NoiseHandshake, NoiseSession

_IDENTITIES: Final = [Identity(bytes([number]) * 32) for number in range(1, 9)]

# The Noise handshake. It draws its keys from the system; here they follow from a number, so that inputs that were
# valid once stay valid. A handshake is brought to where it waits for a message, and put back there for each input.


@contextlib.contextmanager
def _keys(number: int) -> Iterator[None]:
    count = 0

    def generate() -> X25519PrivateKey:
        nonlocal count
        count += 1
        return X25519PrivateKey.from_private_bytes(bytes([number, count]) * 16)

    with mock.patch.object(X25519PrivateKey, "generate", generate):
        yield


def _handshake(number: int, *, initiator: bool, identity: Identity = _IDENTITIES[0]) -> NoiseHandshake:
    with _keys(number):
        return NoiseHandshake(identity, initiator=initiator)


class _Stages:
    """The three messages of a handshake, each with the side that waits for it and several that it would accept."""

    def __init__(self) -> None:
        initiator, responder = _handshake(1, initiator=True), _handshake(2, initiator=False)
        fresh = Snapshot(responder)
        with _keys(3):
            first = initiator.start()
        waiting = Snapshot(initiator)
        with _keys(4):
            second = responder.receive(first)
        last = Snapshot(responder)
        self.sides = [(responder, fresh), (initiator, waiting), (responder, last)]
        firsts, seconds, thirds = [first], [], []
        for number, identity in enumerate(_IDENTITIES):
            with _keys(10 + number):
                firsts.append(_handshake(10 + number, initiator=True, identity=identity).start())
            with _keys(40 + number):
                answering = _handshake(40 + number, initiator=False, identity=identity)
                seconds.append(answering.receive(first))
            waiting.restore()
            initiator._identity = identity
            thirds.append(initiator.receive(second))
        self.messages = [firsts, seconds, thirds]
        dialling, self.finished = _handshake(6, initiator=True), _handshake(7, initiator=False)
        self.finished.receive(dialling.receive(self.finished.receive(dialling.start())))
        self.payload = dialling._payload()  # signs the static key that the finished side knows


_stages = _Stages()


def _valid_handshake(random: Random) -> bytes:
    stage = random.choice(
        (0, 1, 1, 1, 2, 2, 2)
    )  # any 32 bytes are a first message: there is little to find in it
    return bytes([stage]) + random.choice(_stages.messages[stage])


def _run_handshake(data: bytes) -> bool:
    """The first byte says which message is awaited. The two that prove an identity are accepted unchanged only."""
    stage = data[0] % 3 if data else 0
    handshake, snapshot = _stages.sides[stage]
    snapshot.restore()
    stream = data[1:]
    sent = b""
    try:
        for piece in draw.cuts(stream):
            if handshake.result is not None:
                break  # from here on the mux gets what comes
            sent += handshake.receive(piece)
            assert len(handshake._buffer) <= 2 + MAX_HANDSHAKE_BYTES + len(piece)
    except RemoteProtocolError:
        return False
    length = 2 + int.from_bytes(stream[:2], "big")
    if stage:
        known = stream[:length] in _stages.messages[stage]
        assert (handshake.result is not None) == known, "a handshake that nobody made"
        return known
    assert handshake.result is None
    return bool(sent)


# Who is at the other end: the payload inside the handshake's messages. Sealing each one would cost four
# Diffie-Hellmans and reach the same lines.


def _valid_payload(random: Random) -> bytes:
    return _signed_payload


def _run_payload(data: bytes) -> bool:
    try:
        peer = _stages.finished._check(data)
    except RemoteProtocolError:
        return False
    assert peer in [identity.peer_id for identity in _IDENTITIES], "an identity that did not sign"
    return True


def _other_keys() -> tuple[bytes, ...]:
    """Public keys of the kinds that we have no use for but read, as libp2p writes them."""
    rsa = RSAPublicNumbers(65_537, (1 << 2047) + 0x1234567).public_key()
    der = rsa.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    point = bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")
    kinds = ((0, der), (1, bytes(32)), (2, point), (3, der), (2, b"\x04" + bytes(64)), (7, b"key"))
    return tuple(
        b"\x08" + bytes([kind]) + PublicKey(data=key).SerializePartialToString() for kind, key in kinds
    )


# Noise records

_KEY: Final = bytes(range(32))


def _valid_records(random: Random) -> bytes:
    sizes = (0, 1, 12, 100, 1000) if random.random() < 0.98 else (MAX_RECORD_BYTES, 70_000)
    session = NoiseSession(send_key=_KEY, receive_key=_KEY)
    plains = [random.randbytes(random.choice(sizes)) for _ in range(random.randrange(1, 5))]
    return b"".join(session.encrypt([plain]) for plain in plains)


def _run_records(data: bytes) -> bool:
    """Only what sealing gives again byte for byte is delivered."""
    session = NoiseSession(send_key=_KEY, receive_key=_KEY)
    plains: list[bytes] = []
    failed = False
    for piece in draw.cuts(data):
        try:
            plains += session.receive(piece)
        except RemoteProtocolError:
            failed = True
            break
        assert len(session._buffer) < MAX_RECORD_BYTES + 2
    cipher = ChaCha20Poly1305(_KEY)
    at = count = 0
    while plains:
        length = int.from_bytes(data[at : at + 2], "big")
        plain = plains.pop(0) if length > 16 else b""
        sealed = cipher.encrypt(struct.pack("<IQ", 0, count), plain, None)
        assert data[at + 2 : at + 2 + length] == sealed, "plaintext that nobody sealed"
        at += 2 + length
        count += 1
    return not failed


# multistream-select


def _valid_multistream(random: Random) -> bytes:
    protocols = ["/ipfs/id/1.0.0", "/lattica/rpc/1.0.0", "na", "/" + "x" * random.randrange(300)]
    names = [random.choice(protocols) for _ in range(random.randrange(4))]
    if random.random() < 0.7:
        names.append("/yamux/1.0.0")
    return multistream.encode("/multistream/1.0.0", *names) + random.randbytes(random.choice((0, 0, 20)))


class _Pipe:
    """A stream whose bytes are all there: it never makes the negotiation wait."""

    def __init__(self, data: bytes) -> None:
        self._pieces = draw.cuts(data)
        self.sent = 0

    async def send_all(self, data: bytes) -> None:
        self.sent += len(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        return next(self._pieces, b"")

    def unread(self) -> bytes:
        return b"".join(self._pieces)


def _finish(negotiation: Any) -> Any:
    try:
        negotiation.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the negotiation waits for something else than its pipe")


def _run_multistream(data: bytes) -> bool:
    """Read as messages, as the answering side and as the asking side."""
    reader = multistream.MessageReader()
    messages: list[str] = []
    with contextlib.suppress(RemoteProtocolError):
        for piece in draw.cuts(data):
            reader.feed(piece)
            while (message := reader.next_message()) is not None:
                messages.append(message)
            assert len(reader.rest) < multistream.MAX_MESSAGE_BYTES + 2
    again = multistream.MessageReader()
    again.feed(multistream.encode(*messages))
    assert [again.next_message() for _ in messages] == messages
    accepted = False
    for is_answering in (True, False):
        pipe = _Pipe(data)
        try:
            if is_answering:
                chosen, rest = _finish(multistream.answer(pipe, {"/yamux/1.0.0"}))
            else:
                chosen, rest = _finish(multistream.offer(pipe, ["/lattica/rpc/1.0.0", "/yamux/1.0.0"]))
        except RemoteProtocolError:
            continue
        finally:
            assert pipe.sent <= 64 + 4 * multistream.MAX_PROPOSALS
        assert chosen in ("/lattica/rpc/1.0.0", "/yamux/1.0.0", None)
        assert chosen is None or data.endswith(rest + pipe.unread()), "bytes behind the agreement were lost"
        accepted = True
    return accepted or bool(messages)


# identify

_ADDRESSES: Final = (
    "/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/1", "/dns4/example.org/tcp/443/wss", "/ip4/10.0.0.1/udp/4001/quic-v1",
    f"/ip4/192.0.2.1/tcp/4001/p2p/{_IDENTITIES[1].peer_id}/p2p-circuit", f"/p2p/{_IDENTITIES[0].peer_id}",
    "/unix/tmp/socket", "/ip6zone/eth0/ip6/fe80::1/tcp/1",
)  # fmt: skip


def _valid_identify(random: Random) -> bytes:
    return identify.encode(
        _IDENTITIES[0].peer_id,
        agent=draw.text(random),
        protocols=[draw.text(random) for _ in range(random.randrange(5))],
        addresses=random.sample(_ADDRESSES, random.choice((0, 1, 2, 2, 3, 8))),
        observed=Multiaddr(random.choice(_ADDRESSES)) if random.random() < 0.3 else None,
    )


def _run_identify(data: bytes) -> bool:
    peer = _IDENTITIES[0].peer_id
    try:
        size = identify.message_size(data)
        if size is None or size > len(data):
            return False
        found = identify.decode(peer, data[:size])
    except RemoteProtocolError:
        return False
    assert len(found.protocols) <= identify.MAX_PROTOCOLS
    assert len(found.addresses) <= identify.MAX_ADDRESSES
    texts = [found.agent, *found.protocols]
    assert all(len(text) <= identify.MAX_TEXT for text in texts)
    assert all(text.isprintable() for text in (*texts, *found.addresses, found.observed or ""))
    written = identify.encode(
        peer, agent=found.agent, protocols=found.protocols, addresses=found.addresses, observed=None
    )
    assert identify.decode(peer, written) == identify.Description(
        found.agent, found.protocols, found.addresses, None
    )
    return True


def _valid_peer_id(random: Random) -> bytes:
    return str(random.choice(_IDENTITIES).peer_id).encode()


def _run_peer_id(data: bytes) -> bool:
    with contextlib.suppress(ValueError):
        assert PeerId.from_bytes(data).multihash == data
    try:
        peer = PeerId.parse(data.decode(errors="replace"))
    except ValueError:
        return False
    assert PeerId.parse(str(peer)) == peer
    return True


_signed_payload = _stages.payload


def targets() -> list[Target]:
    keys = _other_keys()
    return [
        Target(
            "noise-handshake",
            "NoiseHandshake.receive: each of the three messages",
            _valid_handshake,
            _run_handshake,
            ("lattica.net.noise",),
            memory_bytes=1 << 16,
        ),
        Target(
            "noise-payload",
            "the identity inside a handshake",
            _valid_payload,
            _run_payload,
            ("lattica.net.noise",),
            words=keys,
        ),
        Target(
            "noise-records",
            "NoiseSession.receive: records cut anywhere",
            _valid_records,
            _run_records,
            ("lattica.net.noise",),
            memory_bytes=1 << 17,
            max_bytes=1 << 17,
        ),
        Target(
            "multistream",
            "MessageReader, answer and offer",
            _valid_multistream,
            _run_multistream,
            ("lattica.net.multistream",),
            words=(
                multistream.encode("na"),
                multistream.encode("/yamux/1.0.0"),
                b"\x80\x08",
                b"\xff\xff\x03",
            ),
        ),
        Target(
            "identify",
            "message_size and decode",
            _valid_identify,
            _run_identify,
            ("lattica.net.identify",),
            words=(*keys, *(Multiaddr(address).to_bytes() for address in _ADDRESSES)),
        ),
        Target(
            "peer-ids",
            "PeerId from text and from bytes",
            _valid_peer_id,
            _run_peer_id,
            ("lattica.ids",),
            words=(b"\x00\x24\x08\x01\x12\x20", b"\x12\x20", b"Qm", b"12D3"),
        ),
    ]
