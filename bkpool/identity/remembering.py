"""What a lease remembers of its caller, and how a caller is made of it again.

Pure: no I/O and no clock. Tokens, signatures and times of tokens are not remembered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from bkpool.core.auth import OIDC
from bkpool.core.remembered_caller import RememberedCaller
from bkpool.identity import Identity
from bkpool.identity.claims import default_tenant_claim, find

LONGEST = 4096
"""Bytes of a remembered caller as JSON. It is part of the lease, which every replica keeps in memory."""

_ALWAYS = ("aud", "azp")
"""A configuration names their values, not the claims: the audience and `clientID`."""


def named_claims(settings: Iterable[OIDC]) -> frozenset[str]:
    """The claims that these configurations of an issuer name: in conditions, in mappings, and as the tenant."""
    named = set(_ALWAYS)
    for one in settings:
        mapping = one.claims_mapping
        tenant = one.tenant_claim or default_tenant_claim(one.issuer)
        named |= {name for name in (mapping.user, mapping.groups, mapping.pools, tenant) if name}
        named |= {condition.claim for condition in one.conditions}
    return frozenset(named)


def selected(claims: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    """These claims, each under the whole path that names it, so that `claims.find` finds it. Objects are left out.

    No condition and no mapping accepts an object as a value.
    """
    found = {name: find(claims, name) for name in sorted(names)}
    return {name: value for name, value in found.items() if value is not None and not isinstance(value, dict)}


def remembered(identity: Identity) -> RememberedCaller | None:
    """What a lease of this caller remembers; None if it is not known how they were identified.

    If it is longer than LONGEST, only the method and the name are kept, and `complete` is False.
    """
    caller = whole(identity)
    if caller is not None and len(caller.model_dump_json(by_alias=True).encode()) > LONGEST:
        return caller.but(groups=(), claims="", complete=False)
    return caller


def whole(identity: Identity) -> RememberedCaller | None:
    """All that can be remembered of this caller, of any length; None if it is not known how they were identified."""
    if identity.method is None:
        return None
    return RememberedCaller(
        method=identity.method,
        issuer=identity.authority,
        user=identity.name,
        groups=() if identity.claims else identity.groups,
        claims=json.dumps(identity.claims, separators=(",", ":"), ensure_ascii=False) if identity.claims else "",
    )


def claims_of(caller: RememberedCaller) -> Mapping[str, object]:
    """The remembered claims; empty if there are none, or if somebody has damaged them."""
    try:
        claims = json.loads(caller.claims or "{}")
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}
