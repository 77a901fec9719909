"""The shape of the multiaddrs that a user writes: `/ip4/203.0.113.10/tcp/4001/p2p/12D3...`.

Checked by hand and not with the `multiaddr` package: settings are read before anything of libp2p is imported,
and a sentence that says what is wrong is worth more here than every protocol of the table.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from lattica.ids import PeerId

MAX_LENGTH = 1024  # characters; a host name has at most 253


def check_port(value: str) -> None:
    """Nothing for the decimal text of a port, 0 to 65535; else ValueError."""
    if not value.isascii() or not value.isdecimal() or len(value) > 5 or int(value) > 65535:
        raise ValueError(f"not a port: {value!r}")


def _check_name(value: str) -> None:
    if not value or not value.isprintable() or " " in value:
        raise ValueError(f"not a name: {value!r}")


_HOSTS = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})
_KINDS: dict[str, tuple[Callable[[str], object], str]] = {
    "ip4": (ipaddress.IPv4Address, "an IPv4 address"),
    "ip6": (ipaddress.IPv6Address, "an IPv6 address"),
    "dns": (_check_name, "a host name"),
    "dns4": (_check_name, "a host name"),
    "dns6": (_check_name, "a host name"),
    "tcp": (check_port, "a port from 0 to 65535"),
    "memory": (_check_name, "a name"),  # lattica.testing.MemoryNetwork
    "p2p": (PeerId.parse, "a peer id"),
}


def parts(address: object) -> dict[str, str]:
    """An address by protocol, in its order: `{"ip4": "127.0.0.1", "tcp": "4001", "p2p": "12D3..."}`.

    Raises:
        ValueError: it is no address that a node can listen on, announce or dial; the text is the end of a
            sentence that says why.
    """
    if not isinstance(address, str) or not address.startswith("/") or len(address) > MAX_LENGTH:
        raise ValueError("a multiaddr looks like /ip4/203.0.113.10/tcp/4001")
    words = address[1:].split("/")
    found: dict[str, str] = {}
    for kind, value in zip(words[::2], [*words[1::2], ""], strict=False):
        if kind == "p2p-circuit":
            raise ValueError(f"{address} goes through a relay; name an address of the peer itself")
        if kind not in _KINDS or kind in found:
            raise ValueError(f"{address} has no use for /{kind}; expected /ip4/HOST/tcp/PORT")
        check, wanted = _KINDS[kind]
        try:
            check(value)
        except ValueError:
            raise ValueError(f"{address} has {value!r} where /{kind} wants {wanted}") from None
        found[kind] = value
    whole = "memory" in found or (len(found.keys() & _HOSTS) == 1 and "tcp" in found)
    if not whole or ("p2p" in found and list(found)[-1] != "p2p"):
        raise ValueError(f"{address} is not a host and a port; expected /ip4/HOST/tcp/PORT")
    return found


def peer_of(address: str) -> PeerId | None:
    """The peer that an address names at its end, if it does. Raises as `parts` does."""
    text = parts(address).get("p2p")
    return None if text is None else PeerId.parse(text)
