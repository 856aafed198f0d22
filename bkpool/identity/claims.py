"""Turns verified claims into an Identity, as a configuration maps and restricts them.

Pure, and strict about types: a number is never a name, and True is never 1. A message shows what a claim has instead
of the required value, cut to one line.
"""

from __future__ import annotations

from collections.abc import Mapping

from bkpool.core.auth import OIDC, RESERVED_PREFIXES, ClaimCondition
from bkpool.core.errors import Unauthenticated
from bkpool.core.wildcards import any_matches
from bkpool.identity import EVERYWHERE, Identity, Scope
from bkpool.identity.jwt import shown

_GITHUB = "https://token.actions.githubusercontent.com"
_GITLAB = "https://gitlab.com"
LONGEST_NAME = 256
_JOB_CLAIMS = ("jti", "run_id", "sub")
_LONGEST_JOB_CLAIM = 256
_MOST_POOLS = 100
_MOST_GROUPS = 500  # Microsoft's tokens have up to 200


def identify(
    claims: Mapping[str, object],
    settings: OIDC,
    *,
    source: str = "",
    scope: Scope = EVERYWHERE,
    granted: tuple[str, ...] = (),
) -> Identity:
    """The identity that these claims describe.

    Args:
        claims: Those of a token whose signature, issuer, audience and times have been checked.
        settings: The configuration of the issuer.
        source: The name of the configuration, for messages.
        scope: Where the identity is valid.
        granted: Patterns of pools that the configuration grants.

    Raises:
        Unauthenticated: A condition is not fulfilled, or a required claim is missing or unusable; the message names
            the claim.
    """
    mapping = settings.claims_mapping
    for condition in settings.conditions:
        _check_condition(claims, condition)
    name = _name(claims, mapping.user, "claimsMapping.user")
    if name.startswith(RESERVED_PREFIXES):
        raise Unauthenticated(
            f"claim {mapping.user} is {shown(name)}: a user's name must not begin with {', '.join(RESERVED_PREFIXES)}"
        )
    tenant = settings.tenant_claim or default_tenant_claim(settings.issuer)
    return Identity(
        name=name,
        authority=settings.issuer,
        claim=mapping.user,
        source=source,
        tenant_name=_name(claims, tenant, "tenantClaim") if tenant else None,
        tenant_claim=tenant or "",
        groups=_names(claims, mapping.groups, _MOST_GROUPS),
        pools=_names(claims, mapping.pools, _MOST_POOLS),
        granted=granted,
        scope=scope,
        job=tuple((claim, text) for claim in _JOB_CLAIMS if (text := _one_line(claims.get(claim)))),
    )


def default_tenant_claim(issuer: str) -> str | None:
    """The claim that names the owner of caches if `tenantClaim` is not set: all jobs of a repository share caches.

    It is a number that nobody else can get, not a name that its owner can give up. A token without it is refused: to
    take the name instead would give the caches of a repository to whoever has its name later.
    """
    if issuer == _GITHUB or issuer.startswith(
        f"{_GITHUB}/"
    ):  # the issuer of a GitHub enterprise has its name appended
        return "repository_id"
    return "project_id" if issuer == _GITLAB else None


def _one_line(value: object) -> str:
    """A claim as it may stand in a log: cut, and without what is not printable. Empty if it is no text or number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value)[:_LONGEST_JOB_CLAIM]
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def find(claims: Mapping[str, object], path: str) -> object:
    """The claim at a path; None if it is missing or null.

    A dot may be part of a name (`kubernetes.io`) or separate nested claims. The longest existing name is taken.
    """
    if path in claims:
        return claims[path]
    end = len(path)
    while (end := path.rfind(".", 0, end)) > 0:
        inner = claims.get(path[:end])
        if isinstance(inner, dict) and (found := find(inner, path[end + 1 :])) is not None:
            return found
    return None


def _check_condition(claims: Mapping[str, object], condition: ClaimCondition) -> None:
    found = find(claims, condition.claim)
    if any(_fits(member, condition) for member in (found if isinstance(found, list) else [found])):
        return
    required = [*map(shown, condition.values[:5]), *(f"like {shown(pattern)}" for pattern in condition.patterns[:5])]
    is_now = "is missing" if found is None else f"is {shown(found)}"
    raise Unauthenticated(f"claim {condition.claim} {is_now}; conditions require {' or '.join(required)}")


def _fits(value: object, condition: ClaimCondition) -> bool:
    if any(type(value) is type(wanted) and value == wanted for wanted in condition.values):
        return True
    return isinstance(value, str) and any_matches(condition.patterns, value)


def _name(claims: Mapping[str, object], path: str, field: str) -> str:
    value = find(claims, path)
    if value is None:
        raise Unauthenticated(f"claim {path} ({field}) is missing")
    if not is_name(value):
        raise Unauthenticated(
            f"claim {path} ({field}) is {shown(value)}: not a name of 1 to {LONGEST_NAME} printable characters"
        )
    return str(value)


def _names(claims: Mapping[str, object], path: str | None, most: int) -> tuple[str, ...]:
    value = find(claims, path) if path else None
    several = [] if value is None else value if isinstance(value, list) else [value]
    if len(several) > most:
        raise Unauthenticated(f"claim {path} has {len(several)} entries, more than {most}")
    if not all(map(is_name, several)):
        raise Unauthenticated(
            f"claim {path} is neither a name nor a list of names, each of 1 to {LONGEST_NAME} printable characters"
        )
    return tuple(dict.fromkeys(map(str, several)))


def is_name(value: object) -> bool:
    """Whether it can be a name: a text of 1 to LONGEST_NAME printable characters."""
    return (
        isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable() and value == value.strip()
    )
