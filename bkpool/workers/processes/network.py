"""What the network of a worker process shall be: the rules of its packet filter, and the ports of the host.

Pure. `worker_init` makes the network, and adds the host's own addresses to the rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from urllib.parse import urlsplit

from bkpool.core.egress import NEVER_BY_DEFAULT, NOT_PUBLIC_4, NOT_PUBLIC_6
from bkpool.core.errors import WorkerFailed
from bkpool.core.names import LOOPBACK
from bkpool.core.pool import Egress, PoolSpec

HOST_PORTS = "spec.networking.hostPorts"

Networks = Sequence[IPv4Network | IPv6Network]

_ALL = ("0.0.0.0/0", "::/0")
_REJECT = "reject with icmpx admin-prohibited"

# A socket that is bound to an interface is routed by that interface alone, so loopback addresses could leave by it.
# Neighbour discovery (RFC 4861) is how the kernel finds the router; without raw sockets, no step can
# make its packets.
_HEAD = """\
table inet bkpool {
  set host4 { type ipv4_addr; flags interval; }
  set host6 { type ipv6_addr; flags interval; }
  chain output {
    type filter hook output priority 0; policy accept;
    oifname "lo" accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } accept
    ip daddr 127.0.0.0/8 reject with icmpx admin-prohibited
    ip6 daddr { ::1, ::ffff:0:0/96 } reject with icmpx admin-prohibited
    ip daddr @host4 reject with icmpx admin-prohibited
    ip6 daddr @host6 reject with icmpx admin-prohibited
"""
_TAIL = "  }\n}\n"


def rules(spec: PoolSpec) -> str:
    """The packet filter of a worker, for nft(8): what its processes may connect to.

    The first match decides. The addresses of the host come first and nothing opens them. Then come networks that the
    spec opens by name, then what no policy opens by itself, then the policy.

    Args:
        spec: The pool's; `networking.egress` and `untrusted` matter.
    """
    allowed = _networks(spec.networking.egress.allowed_cidrs)
    never = _networks(NEVER_BY_DEFAULT)
    lines = [
        *_verdict([network for network in allowed if _is_within(network, never)], "accept"),
        *_verdict(never, _REJECT),
    ]
    if spec.egress is not Egress.OPEN:
        closed = (*NOT_PUBLIC_4, *NOT_PUBLIC_6) if spec.egress is Egress.PUBLIC else _ALL
        lines += [*_verdict(allowed, "accept"), *_verdict(_networks(closed), _REJECT)]
    return _HEAD + "".join(f"    {line}\n" for line in lines) + _TAIL


def host_ports(spec: PoolSpec, own_ports: Collection[int]) -> list[int]:
    """The ports of the host's loopback that a worker reaches.

    Args:
        spec: The pool's.
        own_ports: What this appliance listens on.

    Raises:
        WorkerFailed: The spec names a port of the appliance. A build must not reach its API.
    """
    if taken := sorted(set(spec.networking.host_ports) & set(own_ports)):
        raise WorkerFailed(
            f"{HOST_PORTS}: bkpool itself uses {', '.join(map(str, taken))}, which no build may reach",
            hint=f"Remove it from {HOST_PORTS}.",
            field=HOST_PORTS,
        )
    return sorted(set(spec.networking.host_ports))


def unreachable_proxies(spec: PoolSpec, proxies: Iterable[str]) -> list[int]:
    """The ports of proxies on this machine's loopback that a worker of this pool cannot reach.

    Args:
        spec: The pool's.
        proxies: Values of http_proxy and its relatives.
    """
    ports = set()
    for proxy in proxies:
        try:
            url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if url.hostname in LOOPBACK:
                ports.add(url.port or (443 if url.scheme == "https" else 80))
        except ValueError:  # not a URL, or not a port; BuildKit explains that
            continue
    return sorted(ports - set(spec.networking.host_ports))


def _networks(texts: Iterable[str]) -> Networks:
    return [ip_network(text, strict=False) for text in texts]


def _is_within(network: IPv4Network | IPv6Network, others: Networks) -> bool:
    return any(_covers(other, network) for other in others)


def _covers(larger: IPv4Network | IPv6Network, smaller: IPv4Network | IPv6Network) -> bool:
    if isinstance(larger, IPv4Network):
        return isinstance(smaller, IPv4Network) and smaller.subnet_of(larger)
    return isinstance(smaller, IPv6Network) and smaller.subnet_of(larger)


def _verdict(networks: Networks, verdict: str) -> list[str]:
    """One rule for IPv4 and one for IPv6, each if it has networks. Overlapping networks are joined for nft."""
    ipv4 = collapse_addresses(network for network in networks if isinstance(network, IPv4Network))
    ipv6 = collapse_addresses(network for network in networks if isinstance(network, IPv6Network))
    lines = []
    for family, found in (("ip", [str(network) for network in ipv4]), ("ip6", [str(network) for network in ipv6])):
        if found:
            lines.append(f"{family} daddr {{ {', '.join(found)} }} {verdict}")
    return lines
