"""Who is calling, and what they may use.

A credential may be known to several authenticators, or to several configurations of one, each with its own word on
where the caller counts: hence a Caller with several identities, of which the pool in question chooses. Nothing here
keeps a credential in clear longer than a call.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from bkpool.core.names import Key


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an identity counts: everywhere, in one namespace, or at one pool."""

    namespace: str | None = None
    pool: str | None = None

    def covers(self, pool: Key) -> bool:
        """Whether the pool is within it."""
        return self.namespace in {None, pool.namespace} and self.pool in {None, pool.name}


EVERYWHERE = Scope()


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller as one authenticator knows it."""

    name: str
    """As rules, audit lines and leases have it."""
    authority: str = "local"
    """Who vouches for the name: an issuer's URL, `kubernetes`, `local`, or a pool's tokens. Equal names of two
    authorities are two callers."""
    claim: str = ""
    """What of a token the name is: equal names out of two claims are two callers, too."""
    source: str = ""
    """What let it in, for people: `BuildKitOIDCConfig buildkit-system/github`."""
    tenant_name: str | None = None
    """Whose caches this caller uses, where that is not the name."""
    tenant_claim: str = ""
    """What of a token that is."""
    groups: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    """What the credential itself says of pools: literal names, never patterns."""
    granted: tuple[str, ...] = ()
    """Patterns of pools that whoever configured the authenticator lets all its callers use."""
    scope: Scope = EVERYWHERE
    admin: bool = False

    @property
    def digest(self) -> str:
        """The same for the same caller, another for any other: what leases remember of their maker."""
        return _digest("caller", self.authority, self.claim, self.name)

    @property
    def tenant(self) -> str:
        """Whose cache it is that this caller's leases leave behind."""
        if self.tenant_name is None:
            return _digest("tenant", self.authority, self.claim, self.name)
        return _digest("tenant", self.authority, self.tenant_claim, self.tenant_name)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one authenticator, or one of its configurations, says of a credential."""

    source: str
    identity: Identity | None = None
    refusal: str = ""
    """Why not, in words that hold no secret; empty where the credential is not of its kind at all."""
    genuine: bool = False
    """Of a refusal: the credential is what it says it is, and still its holder is not let in here."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Everything that is known of a credential."""

    verdicts: tuple[Verdict, ...]

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Whom it may be, in the order of the authenticators."""
        return tuple(verdict.identity for verdict in self.verdicts if verdict.identity is not None)


class Authenticator(Protocol):
    """One way of knowing a caller."""

    async def authenticate(self, bearer: str) -> tuple[Verdict, ...]:
        """What it says of this bearer token; empty where the token is not of its kind.

        Raises:
            Unavailable: It cannot tell just now (an issuer or the API server is away).
        """
