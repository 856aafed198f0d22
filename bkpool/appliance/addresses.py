"""Where an appliance listens, and whether two of its servers want the same port.

Pure: it opens nothing and asks no resolver.
"""

from __future__ import annotations

from ipaddress import ip_address
from itertools import combinations

from bkpool.appliance.run_options import ALL_ROLES, Address, Role, RunOptions
from bkpool.core.errors import InvalidInput
from bkpool.core.names import GATEWAY_PORT

_SERVERS = {
    "api.address": "the API",
    "gateway.address": "the gateway",
    "metrics.address": "the metrics",
    "dev_issuer.address": "the development issuer",
}
_LOCALHOST = ip_address("127.0.0.1")
_BOTH_FAMILIES = {"localhost": frozenset({"127.0.0.1", "::1"}), "": frozenset({"0.0.0.0", "::"})}  # noqa: S104


def gateway_address(options: RunOptions) -> Address:
    """Where the gateway listens.

    Returns:
        The given address. Otherwise every interface, if the gateway is alone in its pod or a gateway host names this
        machine to others; else loopback.
    """
    gateway = options.settings.gateway
    if gateway.address is not None:
        return gateway.address
    everywhere = gateway.hosts or options.settings.appliance.roles != ALL_ROLES
    return Address("0.0.0.0" if everywhere else "127.0.0.1", GATEWAY_PORT)  # noqa: S104 - mTLS, and asked for


def gateway_hosts(options: RunOptions) -> tuple[str, ...]:
    """The names and addresses at which callers reach the gateway, the one for answers first.

    Returns:
        Those of the settings. Otherwise the address that the gateway listens on, if `localhost` does not
        lead to it. Empty: `localhost`.
    """
    gateway = options.settings.gateway
    if gateway.hosts or gateway.address is None:
        return gateway.hosts
    try:
        literal = ip_address(gateway.address.host)
    except ValueError:
        return ()
    special = literal.is_unspecified or literal == _LOCALHOST or getattr(literal, "scope_id", None)
    return () if special else (str(literal),)


def check_distinct(options: RunOptions) -> None:
    """Checks that no two servers of this process listen on the same port of the same address.

    Raises:
        InvalidInput: Two do; the message names what gave each.
    """
    for (first, one), (second, other) in combinations(_listeners(options).items(), 2):
        if one.port == other.port and one.port and _overlap(one.host, other.host):
            # The message begins with a place that the user gave, if there is one.
            name, earlier = (second, first) if second in options.places else (first, second)
            address = other if name == second else one
            where = options.where(name)
            raise InvalidInput(
                f"{where}: {address} is also the address of {_SERVERS[earlier]} ({options.where(earlier)})",
                hint=f"Give {_SERVERS[name]} another port.",
                field=where,
            )


def _listeners(options: RunOptions) -> dict[str, Address]:
    """Name of the setting to address, for the servers that this process opens."""
    settings = options.settings
    roles = settings.appliance.roles
    opened = {
        "api.address": settings.api.address if Role.API in roles else None,
        "gateway.address": gateway_address(options) if Role.GATEWAY in roles else None,
        "metrics.address": settings.metrics.address,
        "dev_issuer.address": settings.dev_issuer.address if settings.dev_issuer.enabled else None,
    }
    return {name: address for name, address in opened.items() if address is not None}


def _overlap(one: str, other: str) -> bool:
    """Whether a port cannot be opened on both hosts. An IPv6 server does not take the port of IPv4."""
    return any(
        first == second or (_is_ipv6(first) is _is_ipv6(second) and not {first, second}.isdisjoint({"0.0.0.0", "::"}))  # noqa: S104
        for first in _BOTH_FAMILIES.get(one, {one})
        for second in _BOTH_FAMILIES.get(other, {other})
    )


def _is_ipv6(host: str) -> bool:
    return ":" in host
