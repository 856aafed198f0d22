"""Decides which pools an authenticated caller may use. Pure: no I/O and no clock.

Only the admin may use a pool that is being removed: they see what is left of it, but get no lease of it either.
If a pool has rules, they alone decide. Otherwise access is granted by the pool's own authentication method, by the
configuration of an issuer, or by the pools that the token names. Otherwise only the admin may use the pool, unless no
access is configured at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bkpool.core.auth import OIDCConfig
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.removal import REASON as REMOVED
from bkpool.core.removal import removal_of
from bkpool.core.wildcards import any_matches
from bkpool.identity import Identity

_ADMIN_DIGEST = Identity("admin").digest


@dataclass(frozen=True, slots=True)
class AccessDecision:
    """Whether a caller may use a pool, with which identity, and why."""

    allowed: bool
    reason: str
    identity: Identity | None = None
    """The identity that may use the pool, or the first that may not."""


def unconfigured(pools: Iterable[Pool], configs: Iterable[OIDCConfig]) -> bool:
    """Whether access is not configured at all: then every authenticated caller may use every pool."""
    return not any(True for _ in configs) and not any(pool.spec.auth.restricts_access for pool in pools)


def decide(identities: Iterable[Identity], pool: Pool, *, open_to_all: bool) -> AccessDecision:
    """Whether one of these identities may use the pool. The first that may is returned.

    Args:
        identities: The identities of the caller.
        pool: The pool.
        open_to_all: The result of `unconfigured`.
    """
    refused: AccessDecision | None = None
    for identity in identities:
        allowed, reason = _decide_one(identity, pool, open_to_all=open_to_all)
        decision = AccessDecision(allowed, reason, identity)
        if allowed:
            return decision
        refused = refused or decision
    return refused or AccessDecision(allowed=False, reason="the caller is not known")


def _decide_one(identity: Identity, pool: Pool, *, open_to_all: bool) -> tuple[bool, str]:
    rbac, key = pool.spec.auth.rbac, pool.key
    if identity.admin:
        return True, "the admin may use every pool"
    if removal_of(pool) is not None:
        return False, REMOVED
    if not identity.scope.covers(key):
        return False, f"{identity.source} is not valid for this pool"
    if not rbac.enabled:
        return True, "spec.auth.rbac.enabled is false: every authenticated caller may use this pool"
    if rbac.rules:
        return _by_rules(identity, pool)
    return _by_credential(identity, key, open_to_all=open_to_all)


def _by_credential(identity: Identity, key: Key, *, open_to_all: bool) -> tuple[bool, str]:
    if identity.scope.pool is not None:
        return (
            True,
            f"{identity.source}, of the pool's own spec.auth.methods, accepts the caller; the pool has no rules",
        )
    if any_matches(identity.granted, key.name) or any_matches(identity.granted, str(key)):
        return True, f"{identity.source} grants this pool in spec.pools"
    if key.name in identity.pools or str(key) in identity.pools:
        return True, "the token names this pool"
    if open_to_all:
        return True, "access is not configured yet, neither in a pool nor for an issuer"
    return (
        False,
        "the pool has no rule in spec.auth.rbac.rules, and neither the token nor its issuer grants this pool",
    )


def _by_rules(identity: Identity, pool: Pool) -> tuple[bool, str]:
    subjects = _subjects(identity)
    for number, rule in enumerate(pool.spec.auth.rbac.rules):
        here = any_matches(rule.pools, pool.key.name) or any_matches(rule.pools, str(pool.key))
        if here and any(any_matches(rule.users, subject) for subject in subjects):
            return True, f"spec.auth.rbac.rules[{number}] of the pool"
    return False, "no rule in spec.auth.rbac.rules of the pool names this caller"


def _subjects(identity: Identity) -> tuple[str, ...]:
    """What is compared with the `users` of a rule. No user has the name of a group (auth.RESERVED_PREFIXES)."""
    groups = (f"group:{name}" for name in identity.groups)
    return (identity.name, *groups, *(f"pool:{name}" for name in identity.pools))


def decide_by_name(name: str, holder: str, pool: Pool) -> AccessDecision:
    """Whether the maker of a lease of an earlier version, which remembers a name and a digest only, may use the pool.

    Such a lease ends within the pool's maxTokenTTL after the upgrade. Where no rules decide by name, it goes on.

    Args:
        name: The caller's name (Lease.requested_by).
        holder: The caller's digest (Lease.holder).
        pool: The pool.
    """
    identity = Identity(name, source="a lease of an earlier version", admin=holder == _ADMIN_DIGEST)
    if identity.admin or pool.spec.auth.rbac.rules:
        return decide([identity], pool, open_to_all=False)
    return AccessDecision(allowed=True, reason="the lease is of an earlier version, and the pool has no rules")


def is_theirs(pool: Key, identities: Iterable[Identity], holder: str) -> bool:
    """Whether these identities may see, renew and end a lease: they made it, or are the admin."""
    return any(one.admin or (holder and one.digest == holder and one.scope.covers(pool)) for one in identities)
