"""The kinds of NAT that tools/nat_lab.py builds: RFC 4787's words for their behaviour, and nftables rules that show it.

Linux keeps one mapping for each inside socket whatever it talks to, unless told to draw a port for every flow, and
lets in only what answers something. So all kinds filter by address and port; they differ in how they map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Kind:
    """One kind of place to be.

    Attributes:
        mapping: RFC 4787 section 4.1, and 4.2 for the port; empty where nothing is translated.
        filtering: RFC 4787 section 5; empty where nothing is kept out.
        translate: the nftables statement for what leaves; empty where nothing is translated.
        routers: how many stand between the host and the Internet.
    """

    mapping: str = ""
    filtering: str = "address and port-dependent filtering"
    translate: str = ""
    routers: int = 1


_EIM_PORTS: Final = "40000-50000"  # none that a host of the lab listens on
KINDS: Final = {
    "public": Kind(filtering="", routers=0),
    "cone": Kind("endpoint-independent mapping, port preservation", translate="masquerade"),
    "eim": Kind(
        "endpoint-independent mapping, no port preservation", translate=f"masquerade to :{_EIM_PORTS}"
    ),
    "sym": Kind("address and port-dependent mapping, random ports", translate="masquerade fully-random"),
    "cgnat": Kind(
        "endpoint-independent mapping twice: port preservation at home, none at the carrier",
        translate=f"masquerade to :{_EIM_PORTS}",
        routers=2,
    ),
    "firewall": Kind(),
}
HAIRPIN: Final = "hairpin"


@dataclass(frozen=True)
class Place:
    """Where a host is, as `cone`, `cone+hairpin`, or `@a`: behind what `a` is behind, beside it."""

    kind: str
    hairpin: bool = False
    beside: str = ""


def parse_place(text: str, hosts: dict[str, Place]) -> Place:
    """Read one; `hosts` are those that were named before it.

    Raises:
        ValueError: there is no such kind, or no such host to be beside.
    """
    if text.startswith("@"):
        other = hosts.get(text[1:])
        if other is None or other.beside or not KINDS[other.kind].routers:
            raise ValueError(f"{text}: no host {text[1:]!r} behind a router of its own was named before")
        return Place(other.kind, other.hairpin, text[1:])
    kind, plus, word = text.partition("+")
    if kind not in KINDS or (plus and word != HAIRPIN):
        raise ValueError(
            f"{text}: not one of {', '.join(KINDS)}, each of which may have +{HAIRPIN}, nor @HOST"
        )
    if plus and not KINDS[kind].translate:
        raise ValueError(f"{text}: only what translates addresses can hairpin")
    return Place(kind, bool(plus))


def rules(translate: str, address: str, *, hairpin: bool) -> str:
    """What nft reads in a router between `lan*` and `wan`, whose outer address is `address`.

    With hairpin a packet from inside to an outer port that is mapped comes back in, from an outer port as RFC 4787
    section 6 asks for ("external source IP address and port").
    """
    parts = [_FILTER]
    if translate:
        parts.append(_TRANSLATE.format(translate=translate))
    if hairpin:
        parts.append(_HAIRPIN.format(address=address))
    return "\n".join(parts)


_FILTER = """\
table ip filter {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "lan*" accept
        ct status dnat accept
    }
    chain input {
        type filter hook input priority 0; policy accept;
        iifname "wan" ct state established,related accept
        iifname "wan" drop
    }
}
"""
_TRANSLATE = """\
table ip nat {{
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        oifname "wan" meta l4proto {{ tcp, udp }} {translate}
        oifname "wan" masquerade
    }}
}}
"""
# Each flow that leaves says which inside socket its outer port stands for.
_HAIRPIN = """\
table ip hairpin {{
    map mapped {{
        type inet_proto . inet_service : ipv4_addr . inet_service
        flags dynamic,timeout
        timeout 1h
        size 65535
    }}
    chain learn {{
        type filter hook postrouting priority 110; policy accept;
        oifname "wan" meta l4proto {{ tcp, udp }} update @mapped \
{{ meta l4proto . th sport : ct original ip saddr . ct original proto-src }}
    }}
    chain back_in {{
        type nat hook prerouting priority -100; policy accept;
        iifname "lan*" ip daddr {address} dnat ip to meta l4proto . th dport map @mapped
    }}
    chain as_from_outside {{
        type nat hook postrouting priority 100; policy accept;
        oifname "lan*" ct status dnat snat to {address}
    }}
}}
"""
