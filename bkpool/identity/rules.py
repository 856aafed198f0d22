"""What a known caller may use: pure judgement over objects, no I/O and no clock.

A pool's own rules, where it has any, decide alone. Else what lets the caller in may name the pool: the pool's own
method, the configuration of an issuer, or the token's claim of pools. Else nobody but the admin may use it, unless
nothing about access has been configured at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bkpool.core.auth import OIDCConfig
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.wildcards import any_matches
from bkpool.identity import Identity


@dataclass(frozen=True, slots=True)
class AccessDecision:
    """Whether a pool may be used, by whom, and why."""

    allowed: bool
    reason: str
    identity: Identity | None = None
    """Who it is that may, or the first who may not."""


def unconfigured(pools: Iterable[Pool], configs: Iterable[OIDCConfig]) -> bool:
    """Whether nobody has said yet who may use what: then every known caller may use everything."""
    return not any(True for _ in configs) and not any(pool.spec.auth.says_something for pool in pools)


def decide(identities: Iterable[Identity], pool: Pool, *, open_to_all: bool) -> AccessDecision:
    """Whether one of these identities may use the pool; the first that may is taken.

    Args:
        identities: Whom the caller may be.
        pool: The pool.
        open_to_all: From `unconfigured`.
    """
    refused: AccessDecision | None = None
    for identity in identities:
        allowed, reason = _judged(identity, pool, open_to_all=open_to_all)
        decision = AccessDecision(allowed, reason, identity)
        if allowed:
            return decision
        refused = refused or decision
    return refused or AccessDecision(allowed=False, reason="the caller is not known")


def _judged(identity: Identity, pool: Pool, *, open_to_all: bool) -> tuple[bool, str]:
    rbac, key = pool.spec.auth.rbac, pool.key
    if identity.admin:
        return True, "the admin may use every pool"
    if not identity.scope.covers(key):
        return False, f"{identity.source} does not count for this pool"
    if not rbac.enabled:
        return True, "spec.auth.rbac is off: whoever is known may use this pool"
    if rbac.rules:
        return _by_rules(identity, pool)
    return _by_credential(identity, key, open_to_all=open_to_all)


def _by_credential(identity: Identity, key: Key, *, open_to_all: bool) -> tuple[bool, str]:
    if identity.scope.pool is not None:
        return True, f"{identity.source} is the pool's own, and it has no rules"
    if any_matches(identity.granted, key.name) or any_matches(identity.granted, str(key)):
        return True, f"{identity.source} grants it"
    if key.name in identity.pools or str(key) in identity.pools:
        return True, "the token names this pool"
    if open_to_all:
        return True, "nothing says yet who may use what"
    return False, "no rule of the pool and nothing in the credential grants it"


def _by_rules(identity: Identity, pool: Pool) -> tuple[bool, str]:
    subjects = _subjects(identity)
    for number, rule in enumerate(pool.spec.auth.rbac.rules):
        here = any_matches(rule.pools, pool.key.name) or any_matches(rule.pools, str(pool.key))
        if here and any(any_matches(rule.users, subject) for subject in subjects):
            return True, f"spec.auth.rbac.rules[{number}] of the pool"
    return False, "no rule of the pool names this caller"


def _subjects(identity: Identity) -> tuple[str, ...]:
    """What the `users` of a rule are compared with. No user can be called like a group: auth.RESERVED."""
    groups = (f"group:{name}" for name in identity.groups)
    return (identity.name, *groups, *(f"pool:{name}" for name in identity.pools))


def is_theirs(pool: Key, identities: Iterable[Identity], holder: str) -> bool:
    """Whether a lease is theirs to see, renew and end: they made it, or are the admin."""
    return any(one.admin or (holder and one.digest == holder and one.scope.covers(pool)) for one in identities)
