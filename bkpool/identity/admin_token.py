"""The admin token of an appliance on one machine: whoever can read the file may do everything.

The file is the only place where it stands in clear; the appliance itself keeps its digest. A token that cannot be
read is an error, and is never replaced.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from bkpool.core.errors import Unauthenticated
from bkpool.home.files import read_private, unreadable, write_private
from bkpool.identity import Identity, Verdict

_BYTES = 32
_CHARACTERS = 43  # 32 bytes in base64url without padding
_HINT = "To have a new one, remove the file and restart the appliance: bkpool down, then bkpool up -d."


class AdminTokenAuthenticator:
    """Knows the holder of the admin token."""

    def __init__(self, token: str) -> None:
        self._digest = _digest(token)

    async def authenticate(self, bearer: str) -> tuple[Verdict, ...]:
        """See Authenticator. Takes the same time however much of the token is right."""
        if not hmac.compare_digest(_digest(bearer), self._digest):
            return ()
        return (Verdict("the admin's token", Identity("admin", source="the admin's token", admin=True)),)


def load_or_create(home: Path) -> str:
    """The admin token of this home, made if there is none. The caller holds the home's lock.

    Raises:
        HostFault: `Unreadable` (open to others, another user's, damaged), `Permission`, `DiskFull`.
    """
    path = _file(home)
    if not os.path.lexists(path):
        write_private(path, secrets.token_urlsafe(_BYTES).encode() + b"\n")
    return _read(path)


def find(home: Path) -> str:
    """The admin token of this home, for a client on the same machine.

    Raises:
        Unauthenticated: There is none: no appliance has run here.
        HostFault: `Unreadable`.
    """
    path = _file(home)
    if not os.path.lexists(path):
        raise Unauthenticated(
            f"There is no admin token in {home}",
            hint="Start an appliance here with bkpool up -d, or set BKCTL_TOKEN for the one at BKCTL_ENDPOINT.",
        )
    return _read(path)


def _file(home: Path) -> Path:
    return home / "admin.token"


def _read(path: Path) -> str:
    text = read_private(path, hint=_HINT).decode("ascii", "replace").strip()
    if len(text) != _CHARACTERS:
        raise unreadable(path, f"does not hold a token of {_CHARACTERS} characters", hint=_HINT)
    return text


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
