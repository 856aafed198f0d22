"""The names and addresses in the server certificate of a gateway.

Pure functions of what is known at start; no DNS resolver is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from bkpool.core.errors import InvalidInput
from bkpool.core.names import Key

IP = IPv4Address | IPv6Address

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(
    rf"(?=.{{1,253}}\Z)({_LABEL}\.)*(?!\d+\Z){_LABEL}"
)  # RFC 1123 2.1: the last label is never a number
_SERVICE = re.compile(rf"(?P<pool>{_LABEL})\.(?P<namespace>{_LABEL})\.svc(\.cluster\.local)?\.?")


@dataclass(frozen=True, slots=True)
class CertificateNames:
    """The DNS names and IP addresses of a server certificate."""

    dns: tuple[str, ...]
    ips: tuple[IP, ...]


def gateway_names(
    hostname: str, pools: Iterable[Key], extra: Iterable[str] = (), extra_from: str = "host"
) -> CertificateNames:
    """Loopback, this machine, the Services of the pools, and the names that the user adds.

    Args:
        hostname: This machine's name. It is left out if it is not a DNS name, since no client could verify it.
        pools: All pools that the gateway serves. The Service of a pool has the pool's name.
        extra: DNS names and IP addresses that clients use.
        extra_from: What gave them, for the message: an option or a field.

    Raises:
        InvalidInput: One of `extra` is neither; `field` is `extra_from`.
    """
    dns, ips = ["localhost"], [ip_address("127.0.0.1"), ip_address("::1")]
    if _DNS_NAME.fullmatch(hostname.lower()):
        dns.append(hostname.lower())
    for namespace, name in pools:
        service = f"{name}.{namespace}"
        dns += [name, service, f"{service}.svc", f"{service}.svc.cluster.local"]
    for text in extra:
        match parse_host(text, extra_from):
            case str(host):
                dns.append(host)
            case address:
                ips.append(address)
    return CertificateNames(tuple(dict.fromkeys(dns)), tuple(dict.fromkeys(ips)))


def pool_named(host: str) -> Key | None:
    """The pool whose Service has this name: `pool.namespace.svc`, with or without `.cluster.local`. None: no pool."""
    match = _SERVICE.fullmatch(host.lower())
    return None if match is None else Key(match["namespace"], match["pool"])


def is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def parse_host(text: str, where: str) -> str | IP:
    """Parses a host that a user has typed: a DNS name (returned in lower case) or an IP address.

    Args:
        text: The host.
        where: What gave it, for the message.

    Raises:
        InvalidInput: It is neither, or has a port, a scheme, brackets or a zone.
    """
    host = text.strip().lower()
    if _DNS_NAME.fullmatch(host):
        return host
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if address is None or "%" in host:
        raise InvalidInput(
            f"{where}: {text[:80]!r} is neither a DNS name nor an IP address",
            hint="Give it without port, scheme or brackets, such as build.example.com, 192.0.2.7 or 2001:db8::7.",
            field=where,
        )
    return address
