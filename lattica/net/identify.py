"""/ipfs/id/1.0.0 and /ipfs/id/push/1.0.0: what peers say about themselves, to and from bytes.

libp2p's own code keeps no agent, reads without a bound, and runs in tasks that outlive the host; its push
says that it observed an empty address, which go-libp2p refuses. The messages are libp2p's, the reading is
ours.

Source: https://github.com/libp2p/specs/blob/master/identify/README.md
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from libp2p.crypto.serialization import deserialize_public_key
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from lattica.errors import RemoteProtocolError
from lattica.ids import PeerId

PROTOCOL = "/ipfs/id/1.0.0"
PUSH_PROTOCOL = "/ipfs/id/push/1.0.0"
MAX_MESSAGE_BYTES = 64 * 1024  # go-libp2p sends up to 8 KiB, with a signed record
MAX_ADDRESSES = 32
MAX_PROTOCOLS = 256
MAX_TEXT = 256  # characters of an agent or a protocol id


@dataclass(frozen=True, slots=True)
class Description:
    """What a peer says of itself. `addresses` are multiaddrs without its own /p2p/."""

    agent: str = ""
    protocols: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    observed: str | None = None  # our address as the peer sees it


def encode(
    peer: PeerId,
    *,
    agent: str,
    protocols: Iterable[str],
    addresses: Iterable[str],
    observed: Multiaddr | None,
) -> bytes:
    """A message, with its length in front."""
    message = Identify(
        protocol_version="ipfs/0.1.0",
        agent_version=agent,
        public_key=peer.multihash[2:],
        listen_addrs=[Multiaddr(address).to_bytes() for address in addresses],
        protocols=list(protocols),
    )
    if observed is not None:
        message.observed_addr = observed.to_bytes()
    raw: bytes = message.SerializeToString()
    return _varint(len(raw)) + raw


def message_size(data: bytes | bytearray) -> int | None:
    """How many bytes the message at the start of `data` has, its length included; None until that is known.

    Raises:
        RemoteProtocolError: more than MAX_MESSAGE_BYTES.
    """
    length = 0
    for index, byte in enumerate(data[:3]):
        length |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            if length > MAX_MESSAGE_BYTES:
                break
            return index + 1 + length
    else:
        if len(data) < 3:
            return None
    raise RemoteProtocolError(f"an identify message of more than {MAX_MESSAGE_BYTES} bytes")


def decode(peer: PeerId, data: bytes) -> Description:
    """Read a whole message, with its length in front, that `peer` sent.

    What has no use or no sense is left out: addresses of unknown kinds, lists beyond their bounds.

    Raises:
        RemoteProtocolError: it is not an identify message, or describes somebody else.
    """
    start = next((index + 1 for index, byte in enumerate(data) if not byte & 0x80), len(data))
    try:
        message = Identify.FromString(data[start:])
        if message.public_key and ID.from_pubkey(deserialize_public_key(message.public_key)).to_bytes() != (
            peer.multihash
        ):
            raise ValueError("another peer's key")
    except Exception as error:  # protobuf's and each key kind's own errors
        raise RemoteProtocolError(f"not an identify message of {peer}", peer=peer) from error
    observed = _address(message.observed_addr)
    return Description(
        agent=_printable(message.agent_version),
        protocols=tuple(_printable(text) for text in message.protocols[:MAX_PROTOCOLS]),
        addresses=tuple(
            text for raw in message.listen_addrs[:MAX_ADDRESSES] if (text := _address(raw, peer)) is not None
        ),
        observed=observed,
    )


def _address(raw: bytes, peer: PeerId | None = None) -> str | None:
    if not raw:
        return None
    try:
        text = str(Multiaddr(raw))
        if not text.isprintable() or Multiaddr(text).to_bytes() != raw:  # a file's name holds any bytes
            return None
    except Exception:  # multiaddr's parser raises what its codecs raise
        return None
    return text.removesuffix(f"/p2p/{peer}") or None


def _printable(text: str | bytes) -> str:
    """Text that cannot steer a terminal. protobuf gives bytes for text that is not UTF-8."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return "".join(letter for letter in text[:MAX_TEXT] if letter.isprintable())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
