"""Reads what the kernel and resolv.conf say about the host, and makes from it what a worker needs. Pure."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

from . import NAMESERVER


def local_addresses(fib_trie: str, if_inet6: str) -> tuple[list[str], list[str]]:
    """The IPv4 and the IPv6 addresses of the host, without those of loopback.

    Args:
        fib_trie: The text of /proc/net/fib_trie. Lines of local addresses follow the line with the address.
        if_inet6: The text of /proc/net/if_inet6.
    """
    found4 = set(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", fib_trie))
    found6 = {socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])) for line in if_inet6.splitlines()}
    return sorted(address for address in found4 if not address.startswith("127.")), sorted(found6 - {"::1"})


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


def host_rules(addresses4: Sequence[str], addresses6: Sequence[str]) -> str:
    """The nft commands that make these the addresses of the host, all at once."""
    lines = []
    for name, addresses in (("host4", addresses4), ("host6", addresses6)):
        lines.append(f"flush set inet bkpool {name}")
        if addresses:
            lines.append(f"add element inet bkpool {name} {{ {', '.join(addresses)} }}")
    return "\n".join(lines) + "\n"
