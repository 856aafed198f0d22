"""What a lease remembers of the caller who made it, so that a renewal can ask today's rules about them.

It has no credential and nothing that one could be made of. `identity` decides what is remembered and what it means.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import StrictBool, StrictStr

from bkpool.core.resource import Model


class CallerMethod(StrEnum):
    """How a caller was identified."""

    ADMIN = "admin"
    TOKEN = "token"  # noqa: S105 - the name of a method
    SERVICE_ACCOUNT = "serviceAccount"
    OIDC = "oidc"


class RememberedCaller(Model):
    """A caller, without their credential."""

    method: CallerMethod
    issuer: StrictStr
    """What the name comes from (Identity.authority): an issuer's URL, `kubernetes`, `local`, or a pool's tokens."""
    user: StrictStr
    groups: tuple[StrictStr, ...] = ()
    """Of a ServiceAccount. Those of an OIDC token are among its claims."""
    claims: StrictStr = ""
    """Those claims of an OIDC token that conditions and mappings of its issuer named, as a JSON object. It is a text,
    so that no store changes the type of a value: conditions compare types."""
    complete: StrictBool = True
    """False: groups and claims were too large to be remembered. Then the caller has to show their credential."""
