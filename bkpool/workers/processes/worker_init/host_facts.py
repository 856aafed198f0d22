"""Reads what the kernel and resolv.conf say about the host, and makes from it what a worker needs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import TypeVar

from . import NAMESERVER

Network = TypeVar("Network", IPv4Network, IPv6Network)

_LOOPBACK_4, _LOOPBACK_6 = IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")
_RTF_LOCAL, _RTF_ANYCAST = 0x80000000, 0x00100000  # flags of IPv6 routes (linux/ipv6_route.h)


def local_networks(fib_trie: str, if_inet6: str, ipv6_route: str) -> tuple[list[str], list[str]]:
    """The IPv4 and the IPv6 networks whose addresses all mean the host, without those of loopback.

    Most are one address of an interface. A local route makes every address of a network the host's, and programs that
    balance loads use that. A router has an anycast address in each of its IPv6 networks.

    Args:
        fib_trie: The text of /proc/net/fib_trie. What is known of an address follows the line with it.
        if_inet6: The text of /proc/net/if_inet6.
        ipv6_route: The text of /proc/net/ipv6_route.
    """
    found4, address = set(), ""
    for line in fib_trie.splitlines():
        first, *rest = line.split()
        if first == "|--":
            address = rest[0]
        elif rest[-1:] == ["LOCAL"]:
            found4.add(IPv4Network(f"{address}{first}"))
    found6 = {IPv6Network(int(line.split()[0], 16)) for line in if_inet6.splitlines()}
    for row in map(str.split, ipv6_route.splitlines()):
        if int(row[8], 16) & (_RTF_LOCAL | _RTF_ANYCAST):
            found6.add(IPv6Network((int(row[0], 16), int(row[1], 16))))
    return _joined(found4, _LOOPBACK_4), _joined(found6, _LOOPBACK_6)


def _joined(found: Iterable[Network], loopback: Network) -> list[str]:
    """Without networks in each other, which nft refuses. A route for all addresses is not about the host's own."""
    others = [one for one in found if one.prefixlen and not one.subnet_of(loopback)]
    return [str(one) for one in sorted(collapse_addresses(others))]


def outer_interface(route: str, ipv6_route: str) -> tuple[str, bool] | None:
    """The interface that leads to other machines, and whether it has a default route. None: there is none.

    Args:
        route: The text of /proc/net/route.
        ipv6_route: The text of /proc/net/ipv6_route.
    """
    ipv4 = [line.split() for line in route.splitlines()[1:]]
    ipv6 = [line.split() for line in ipv6_route.splitlines()]
    with_default = [row[0] for row in ipv4 if row[1] == row[7] == "00000000"]
    with_default += [row[9] for row in ipv6 if row[1] == "00" and row[9] != "lo"]
    others = [row[0] for row in ipv4 if row[0] != "lo"]
    if with_default:
        return with_default[0], True
    return (others[0], False) if others else None


def nameservers(resolv_conf: str) -> list[str]:
    """The name servers of a resolv.conf(5). Without any, a resolver asks this machine."""
    return re.findall(r"^nameserver\s+(\S+)", resolv_conf, re.MULTILINE) or ["127.0.0.1"]


def worker_resolv_conf(resolv_conf: str) -> str:
    """The host's resolv.conf, with the relay in place of its name servers."""
    kept = [line for line in resolv_conf.splitlines() if line.split()[:1] in (["search"], ["domain"], ["options"])]
    return "\n".join([f"nameserver {NAMESERVER}", *kept]) + "\n"


def host_rules(networks4: Sequence[str], networks6: Sequence[str]) -> str:
    """The nft commands that make these the networks of the host, all at once."""
    lines = []
    for name, networks in (("host4", networks4), ("host6", networks6)):
        lines.append(f"flush set inet bkpool {name}")
        if networks:
            lines.append(f"add element inet bkpool {name} {{ {', '.join(networks)} }}")
    return "\n".join(lines) + "\n"
