"""The admin token of an appliance on one machine. A user who can read its file may do everything.

Only the file has the token in plain text; the appliance keeps a digest. A token that cannot be read is an error and
is never replaced.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from bkpool.core import tokens
from bkpool.core.errors import Unauthenticated
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import CallerMethod, RememberedCaller
from bkpool.home.files import read_private, unreadable, write_private
from bkpool.identity import Identity, Verdict

_SOURCE = "the admin's token"
_ADMIN = Verdict(_SOURCE, Identity("admin", source=_SOURCE, admin=True, method=CallerMethod.ADMIN))
_BYTES = 32
_CHARACTERS = 43  # 32 bytes in base64url without padding
_HINT = "To create a new one, remove the file and restart the appliance: bkpool down, then bkpool up -d."


class AdminTokenAuthenticator:
    """Identifies the holder of the admin token."""

    def __init__(self, token: str) -> None:
        self._digest = tokens.digest(token)

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:  # noqa: ARG002
        """See Authenticator. It takes the same time for every wrong token."""
        if not hmac.compare_digest(tokens.digest(bearer), self._digest):
            return ()
        return (_ADMIN,)

    async def recall(self, caller: RememberedCaller, pool: Pool) -> tuple[Verdict, ...]:  # noqa: ARG002
        """See Authenticator. The admin stays the admin, also with another token."""
        return (_ADMIN,) if caller.method is CallerMethod.ADMIN else ()


def load_or_create(home: Path) -> str:
    """The admin token of this home, created if there is none. The caller holds the lock of the home.

    Raises:
        HostFault: `Unreadable` (open to others, owned by another user, damaged), `Permission`, `DiskFull`.
    """
    path = _file(home)
    if not os.path.lexists(path):
        write_private(path, secrets.token_urlsafe(_BYTES).encode() + b"\n")
    return _read(path)


def find(home: Path) -> str:
    """The admin token of this home, for a client on the same machine.

    Raises:
        Unauthenticated: There is none, because no appliance has run here.
        HostFault: `Unreadable`.
    """
    path = _file(home)
    if not os.path.lexists(path):
        raise Unauthenticated(
            f"there is no admin token in {home}",
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
