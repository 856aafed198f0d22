"""Who may call this appliance: the authenticators of its backend, over the pools and issuers of the store.

It only combines them. The `identity` room decides who a caller is and what they may do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Forbidden, HostFault
from bkpool.core.pool import Pool
from bkpool.identity import Authenticator
from bkpool.identity.access import AccessControl
from bkpool.identity.admin_token import AdminTokenAuthenticator
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.oidc import OidcAuthenticator, TrustedIssuer, trusted_issuers
from bkpool.settings.model import IdentitySettings
from bkpool.store.mirror import Mirror


@dataclass(frozen=True, slots=True)
class BackendAuthenticators:
    """The authenticators that only one backend has."""

    static: tuple[Authenticator, ...] = ()
    """For tokens that pools name in files or Secrets."""
    signed: tuple[Authenticator, ...] = ()
    """For tokens that the backend itself signs."""


MakeAuthenticators = Callable[[Callable[[], Iterable[Pool]]], BackendAuthenticators]
"""Makes the authenticators of a backend. Its argument returns the pools of the moment."""


def _seconds() -> float:
    """Monotonic time that also counts while the machine sleeps: keys grow old meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def open_issuers(stack: AsyncExitStack, settings: IdentitySettings) -> IssuerKeys:
    """A cache of the issuers' keys, closed with the stack."""
    issuers = IssuerKeys(
        clock=_seconds,
        timeout=settings.issuer_timeout.total_seconds(),
        fresh=settings.keys_fresh.total_seconds(),
        stale=settings.keys_stale.total_seconds(),
    )
    stack.push_async_callback(issuers.close)
    return issuers


def make_access_control(
    admin: AdminTokenAuthenticator,
    backend_authenticators: MakeAuthenticators,
    issuers: IssuerKeys,
    mirror: Mirror,
    *,
    namespace: str,
    audience: str,
    leeway: float,
    extra_configs: tuple[OIDCConfig, ...] = (),
    now: Callable[[], datetime],
    missing_network: HostFault | None = None,
) -> AccessControl:
    """All authenticators of this appliance.

    The admin's token is asked about first and the Secrets and files of pools last, so that no pool's author can delay
    the admin or a caller with a signed token.

    Args:
        admin: The admin token, which permits everything.
        backend_authenticators: Makes the backend's own authenticators.
        issuers: The keys of OIDC issuers.
        mirror: Knows pools and issuers.
        namespace: The appliance's namespace: issuers that are configured there count for all pools.
        audience: What tokens of issuers must be made for, where their configuration names no audience.
        leeway: Seconds by which the clocks of issuers may differ.
        extra_configs: Issuers that are configured in no object (the development issuer).
        now: The clock.
        missing_network: Why workers have no network of their own; then only the admin is served.
    """

    def pools() -> tuple[Pool, ...]:
        return tuple(mirror.pools.values())

    def configs() -> tuple[OIDCConfig, ...]:
        return (*mirror.configs.values(), *extra_configs)

    def any_unreadable() -> bool:
        return bool(mirror.unreadable_pools or mirror.unreadable_configs)

    def trusted() -> list[TrustedIssuer]:
        return trusted_issuers(configs(), pools(), namespace, audience)

    oidc = OidcAuthenticator(issuers, trusted, now, leeway)
    own = backend_authenticators(pools)
    only_admin = no_network(missing_network) if missing_network else None
    stages = ((admin,), (*own.signed, oidc), own.static)
    return AccessControl(stages, pools, configs, only_admin, any_unreadable=any_unreadable)


def no_network(fault: HostFault) -> Forbidden:
    """The refusal of everybody but the admin, where builds of one caller could reach those of another."""
    return Forbidden(
        f"only the admin is served here, because workers have no network of their own: {fault.message}",
        hint=f"The operator of this appliance can mend that and start it again. {fault.hint} Or they can accept that "
        "builds reach each other and this machine: bkpool up --host-network.",
    )
