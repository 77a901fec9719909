"""Multiaddrs as this node uses them: what they mean, which it can dial, what a wildcard stands for.

TCP over an IP address or a name is all there is for now: /ip4, /ip6, /dns, /dns4 or /dns6, then /tcp/PORT.
"""

from __future__ import annotations

import socket as stdlib_socket
from typing import Any

from multiaddr import Multiaddr
from multiaddr.utils import get_thin_waist_addresses

from lattica.errors import ConfigError, DialError
from lattica.ids import PeerId


def parsed(address: str) -> Multiaddr:
    """A multiaddr from a setting. Raises ConfigError."""
    try:
        return Multiaddr(address)
    except Exception as error:  # multiaddr raises what its codecs raise
        raise ConfigError(f"{address!r} is not a multiaddr; they look like /ip4/0.0.0.0/tcp/4001") from error


def expanded(bound: Multiaddr) -> list[str]:
    """What a listening address stands for; of a wildcard, loopback last: it helps this machine alone."""
    found = [str(address) for address in get_thin_waist_addresses(bound)]
    for wildcard, loopback in (("/ip4/0.0.0.0/", "/ip4/127.0.0.1/"), ("/ip6/::/", "/ip6/::1/")):
        if str(bound).startswith(wildcard):
            found.append(str(bound).replace(wildcard, loopback))
    return found


def dialable(address: str, peer: PeerId) -> str | None:
    """The address without its /p2p/ID; None when we can't dial it, or it is somebody else's."""
    try:
        where = Multiaddr(address.removesuffix(f"/p2p/{peer}"))
    except Exception:
        return None
    names = [protocol.name for protocol in where.protocols()]
    return str(where) if names[1:] == ["tcp"] and names[0] in ("ip4", "ip6", "dns", "dns4", "dns6") else None


def target(address: str) -> tuple[PeerId, str]:
    """Whom an address leads to, and where. Raises DialError."""
    before, _, name = address.rpartition("/p2p/")
    try:
        peer = PeerId.parse(name)
    except ValueError as error:
        raise DialError(f"{address!r} does not end in /p2p/ and a peer id") from error
    where = dialable(before, peer)
    if where is None:
        raise DialError(f"cannot dial {address!r}: addresses look like /ip4/192.0.2.1/tcp/4001/p2p/{peer}")
    return peer, where


def host_and_port(address: Multiaddr) -> tuple[str, int, stdlib_socket.AddressFamily | None]:
    """Where an address points; the family is None for names. ConfigError for other kinds of addresses."""
    names = [protocol.name for protocol in address.protocols()]
    families = {"ip4": stdlib_socket.AF_INET, "ip6": stdlib_socket.AF_INET6}
    if names[1:2] != ["tcp"] or names[0] not in (*families, "dns", "dns4", "dns6"):
        raise ConfigError(f"{address} is not an address of ours; they look like /ip4/192.0.2.1/tcp/4001")
    host, port = address.value_for_protocol(names[0]), address.value_for_protocol("tcp")
    return str(host), int(port or 0), families.get(names[0])


def address_of(name: tuple[Any, ...]) -> Multiaddr:
    """A socket's name as a multiaddr."""
    host = str(name[0]).partition("%")[0]
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{name[1]}")
