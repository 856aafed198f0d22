"""Who is calling, and what they may use.

Later methods (OIDC, ServiceAccounts) are further Authenticators; nothing here keeps a credential in clear longer
than a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller as everything else knows it."""

    name: str
    admin: bool = False

    @property
    def tenant(self) -> str:
        """Whose cache it is that this caller's leases leave behind."""
        return self.name


class Authenticator(Protocol):
    """One way of knowing a caller."""

    async def authenticate(self, bearer: str) -> Identity | None:
        """Whose bearer token this is; None if it is not of this method's kind or not valid."""
