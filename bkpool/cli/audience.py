"""Which audience an ID token must have for an appliance, as the appliance itself says.

A token is never requested for another server than the one that gets it: whoever answers at the endpoint could use it
there.
"""

from __future__ import annotations

import os

from bkpool.core.errors import InvalidInput
from bkpool.core.names import AUDIENCE
from bkpool.core.urls import canonical

VARIABLE = "BKCTL_AUDIENCE"


def given() -> str:
    """The audience that the user gives; empty if they give none."""
    return os.environ.get(VARIABLE, "")


def accepted(wanted: object, endpoint: str, *, own: bool) -> str:
    """The audience that an appliance asks for, if a token for it may be given to this appliance.

    Args:
        wanted: What the appliance says.
        endpoint: The URL to which the token will be sent.
        own: Whether it is the appliance of this home, which may have another URL for callers elsewhere.

    Raises:
        InvalidInput: It names another server.
    """
    if wanted == AUDIENCE or (isinstance(wanted, str) and (own or wanted == canonical(endpoint))):
        return str(wanted)
    raise InvalidInput(
        f"{endpoint} asks for an ID token for {str(wanted)[:200]!r}, which is not its own address",
        hint=f"If that is its address for others, set {VARIABLE} to it, or BKCTL_ENDPOINT to the address.",
        field="BKCTL_ENDPOINT",
    )
