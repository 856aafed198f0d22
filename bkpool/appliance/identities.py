"""Who may speak to this appliance: the authenticators of its backend over the objects that there are.

It only puts them together. Who an issuer's caller is, and what he may do, is judged in `identity`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import datetime

from bkpool.core.auth import OIDCConfig
from bkpool.core.pool import Pool
from bkpool.identity import Authenticator
from bkpool.identity.access import AccessControl
from bkpool.identity.admin_token import AdminTokenAuthenticator
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.oidc import OidcAuthenticator, trusted_issuers
from bkpool.store.mirror import Mirror

Methods = Callable[[Callable[[], Iterable[Pool]]], Sequence[Authenticator]]
"""The ways of knowing a caller that only one backend has, over the pools as of any moment."""


def open_issuers(stack: AsyncExitStack) -> IssuerKeys:
    """The keys of issuers, kept until the stack is closed."""
    issuers = IssuerKeys(clock=time.monotonic)
    stack.push_async_callback(issuers.close)
    return issuers


def access(
    admin: AdminTokenAuthenticator,
    methods: Methods,
    issuers: IssuerKeys,
    mirror: Mirror,
    *,
    namespace: str,
    also: tuple[OIDCConfig, ...] = (),
    now: Callable[[], datetime],
) -> AccessControl:
    """Everybody who can be known here, the cheapest way of knowing first.

    Args:
        admin: Whose token opens everything.
        methods: Of the backend.
        issuers: Their keys.
        mirror: Knows pools and issuers.
        namespace: The appliance's own: issuers configured there count for all pools.
        also: Issuers that are configured in no object (the development issuer).
        now: The clock.
    """

    def pools() -> tuple[Pool, ...]:
        return tuple(mirror.pools.values())

    def configs() -> tuple[OIDCConfig, ...]:
        return (*mirror.configs.values(), *also)

    oidc = OidcAuthenticator(issuers, lambda: trusted_issuers(configs(), pools(), namespace), now)
    return AccessControl((admin, *methods(pools), oidc), pools, configs)
