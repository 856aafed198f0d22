"""Authentication and authorization: who is calling, and which pools they may use.

Several authenticators, or several configurations of one, may accept the same credential, each for other pools. So a
Caller has several identities, and for each pool one that is valid there is chosen. No credential is kept in plain
text for longer than a call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import CallerMethod, RememberedCaller


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an identity is valid: for all pools, for those of one namespace, or for one pool."""

    namespace: str | None = None
    pool: str | None = None

    def covers(self, pool: Key) -> bool:
        """Whether the pool is in this scope."""
        return self.namespace in {None, pool.namespace} and self.pool in {None, pool.name}


EVERYWHERE = Scope()


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller as one authenticator identifies them."""

    name: str
    """The name in rules, audit lines and leases."""
    authority: str = "local"
    """What the name comes from: an issuer's URL, `kubernetes`, `local`, or a pool's tokens. The same name from two
    authorities means two different callers."""
    claim: str = ""
    """The claim that the name was taken from. The same name from two claims means two different callers, too."""
    source: str = ""
    """What accepted the credential, for messages: `BuildKitOIDCConfig buildkit-system/github`."""
    tenant_name: str | None = None
    """The owner of the caches that this caller uses, if that is not the name."""
    tenant_claim: str = ""
    """The claim that the tenant's name was taken from."""
    groups: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    """Pools that the credential itself names: literal names, never patterns."""
    granted: tuple[str, ...] = ()
    """Patterns of pools that the authenticator's configuration grants to all its callers."""
    scope: Scope = EVERYWHERE
    admin: bool = False
    method: CallerMethod | None = None
    """How the caller was identified; None if a lease shall not remember it."""
    claims: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)
    """The claims of the token that its issuer's configurations name (`remembering.named_claims`)."""
    job: tuple[tuple[str, str], ...] = ()
    """Claims of the credential that say which job it was made for, for the audit line. They identify nobody."""

    @property
    def digest(self) -> str:
        """Identifies the caller: leases store it, to know who made them. Two callers never have the same."""
        return _digest("caller", self.authority, self.claim, self.name)

    @property
    def tenant(self) -> str:
        """The owner of the caches that this caller's leases leave behind."""
        if self.tenant_name is None:
            return _digest("tenant", self.authority, self.claim, self.name)
        return _digest("tenant", self.authority, self.tenant_claim, self.tenant_name)


@lru_cache(maxsize=1024)
def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one authenticator, or of one of its configurations, for a credential."""

    source: str
    identity: Identity | None = None
    refusal: str = ""
    """Why it was refused, without any secret; empty if the credential is of another kind."""
    genuine: bool = False
    """For a refusal: the credential is genuine, but its holder has no access here."""


@dataclass(frozen=True, slots=True)
class Caller:
    """All results for one credential."""

    verdicts: tuple[Verdict, ...]

    @property
    def identities(self) -> tuple[Identity, ...]:
        """The identities of the caller, in the order of the authenticators."""
        return tuple(verdict.identity for verdict in self.verdicts if verdict.identity is not None)


class Authenticator(Protocol):
    """A method to identify a caller."""

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:
        """Its results for this bearer token; empty if the token is of another kind.

        Args:
            bearer: The token.
            pool: The pool that the caller asks for, if they ask for one. What only concerns others may be left out
                if the token is valid there.

        Raises:
            Unavailable: It cannot decide now, because an issuer or the API server cannot be reached.
        """

    async def recall(self, caller: RememberedCaller, pool: Pool) -> tuple[Verdict, ...]:
        """What it says today about a caller whom it has identified before, without a credential.

        It asks no issuer and no API server about the caller: only today's configuration counts.

        Args:
            caller: What is remembered of them.
            pool: The pool that they use. Identities for other pools may be left out.

        Returns:
            As `authenticate`; empty if another method has identified them.

        Raises:
            Unavailable: Today's configuration cannot be read now.
        """
