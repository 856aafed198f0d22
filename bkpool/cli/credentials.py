"""Which bearer token goes to which appliance: the one that the user gives, else the one of the platform.

The admin's token goes to the appliance of this home only, over its local socket. No token is shown, or stands in
a command line.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

from bkpool.cli import console, home
from bkpool.core.errors import InvalidInput

EXPLICIT_VARIABLES = ("BKCTL_TOKEN", "BKCTL_TOKEN_FILE")
ISSUER_VARIABLE = "BKCTL_OIDC_ISSUER"
GITHUB_URL, GITHUB_TOKEN = "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
GITLAB = "BKPOOL_ID_TOKEN"
"""The name that docs/ci.md gives the token in GitLab (`id_tokens`)."""
POD_TOKEN_FILE = Path("/var/run/secrets/bkpool/token")
"""Where a pod has the projected token of its ServiceAccount, for the audience of bkpool."""
MIN_REMAINING_LIFE = 30.0
"""Seconds: a token that expires sooner is not used for another call."""
MAX_TOKEN_LENGTH = 16_384
"""Characters of a token; the API reads no more."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 2.1
_NOT_TEXT = ("it is not text", "It must hold only the token.")
_FIX = "It must hold only the token, without quotes or line ends."


class Credential:
    """A source of bearer tokens that can be used now.

    Args:
        name: Where the token comes from, for errors.
        fetch: Gets a token.
        cached: Whether a token is used until it expires, because fetching is slow; else each call fetches it.
        only_local: Whether it may be sent to nothing but the local socket of the appliance here.
    """

    def __init__(
        self, name: str, fetch: Callable[[], str], *, cached: bool = False, only_local: bool = False
    ) -> None:
        self.name = name
        self.only_local = only_local
        self._fetch = fetch
        self._cached = cached
        self._token: str | None = None

    def bearer(self, *, fresh: bool = False) -> str:
        """The token. With `fresh`, which is for after a refusal, it is fetched again.

        Raises:
            InvalidInput: It cannot be read or is not a token; the message names its source.
            Unavailable: The issuer does not answer.
        """
        if self._token is None or fresh or not self._cached or expires_soon(self._token, time()):
            self._token = checked(self._fetch(), self.name)
        return self._token


@dataclass(frozen=True, slots=True)
class RequestedClaims:
    """Who a caller wants to be for a development issuer, from the options of the older bkctl."""

    actor: str | None = None
    repository: str | None = None
    subject: str | None = None

    def options(self) -> list[str]:
        """The options that were given."""
        return [f"--oidc-{name}" for name in ("actor", "repository", "subject") if getattr(self, name)]

    def request(self, audience: str, **more: Any) -> dict[str, Any]:
        """The body of POST /token of the issuer. Without a subject it has the one of a job on GitHub."""
        job = f"repo:{self.repository}:ref:refs/heads/main" if self.repository else None
        claims = {"actor": self.actor or self.subject or _login(), "repository": self.repository}
        given = {name: value for name, value in claims.items() if value}
        return {"sub": self.subject or job or given["actor"], "aud": audience, "claims": given, **more}


def find(
    appliance: home.Appliance | None,
    claims: RequestedClaims | None = None,
    *,
    local: bool,
    audience: Callable[[], str],
) -> Credential | None:
    """The credential for a call.

    Args:
        appliance: The appliance that runs from this home.
        claims: Who the caller wants to be.
        local: Whether the call goes to that appliance.
        audience: Returns what a token for the call must be made for; it may ask the appliance.

    Raises:
        InvalidInput: An environment variable is not valid; the message names it.
    """
    given = explicit()
    if claims and claims.options():
        variable = os.environ.get(ISSUER_VARIABLE)
        issuer = variable or (appliance.dev_issuer if appliance and local else None)
        if given is None and issuer:
            return _from_dev_issuer(issuer, claims, audience, ISSUER_VARIABLE if variable else "appliance.json")
        _note_without_effect(claims)
    if given is not None:
        return given
    return (admin() if local else None) or _from_platform(audience)


def explicit() -> Credential | None:
    """The token that the user gives, which comes before all others; None if there is none.

    Raises:
        InvalidInput: It is not a token.
    """
    if token := os.environ.get(EXPLICIT_VARIABLES[0], "").strip():
        checked(token, EXPLICIT_VARIABLES[0])
        return Credential(EXPLICIT_VARIABLES[0], lambda: token)
    if file := os.environ.get(EXPLICIT_VARIABLES[1]):
        return Credential(EXPLICIT_VARIABLES[1], lambda: read(Path(file), EXPLICIT_VARIABLES[1]))
    return None


def admin() -> Credential | None:
    """The admin token of this home, for its appliance's socket only; None where this user may not read it."""
    token = home.admin_token()
    return Credential("admin.token", lambda: token, only_local=True) if token else None


def expires_soon(token: str, now: float) -> bool:
    """Whether a JWT has expired or is about to; False for any other token. Nothing is verified."""
    try:
        part = token.split(".")[1]
        expires = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))["exp"]
        return bool(expires < now + MIN_REMAINING_LIFE)
    except (IndexError, KeyError, TypeError, ValueError):
        return False


def read(path: Path, variable: str) -> str:
    """The content of a file with a token. Raises InvalidInput, which names the variable (or option)."""
    try:
        with path.open(encoding="ascii") as file:
            return file.read(MAX_TOKEN_LENGTH + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        why, hint = (error.strerror, "Name a file that you can read.") if isinstance(error, OSError) else _NOT_TEXT
        raise InvalidInput(f"{variable}: {path} cannot be read: {why}", hint=hint, field=variable) from None


def checked(token: str, variable: str) -> str:
    """The token, if it has the form of one. Raises InvalidInput, which does not quote it."""
    if len(token) <= MAX_TOKEN_LENGTH and _TOKEN.fullmatch(token):
        return token
    problem = (
        "is longer than a token may be"
        if len(token) > MAX_TOKEN_LENGTH
        else "has characters that a bearer token cannot have"
    )
    raise InvalidInput(f"{variable}: {problem if token else 'holds no token'}", hint=_FIX, field=variable)


def _from_platform(audience: Callable[[], str]) -> Credential | None:
    """The token that GitHub Actions, GitLab CI or Kubernetes gives to a job or pod."""
    if url := os.environ.get(GITHUB_URL):
        return Credential(GITHUB_URL, lambda: _github(url, audience), cached=True)
    if token := os.environ.get(GITLAB, "").strip():
        return Credential(GITLAB, lambda: token)
    if POD_TOKEN_FILE.exists():
        return Credential(str(POD_TOKEN_FILE), lambda: read(POD_TOKEN_FILE, str(POD_TOKEN_FILE)))
    return None


def _github(url: str, audience: Callable[[], str]) -> str:
    from bkpool.cli import issuers  # noqa: PLC0415 - only in GitHub Actions

    token = os.environ.get(GITHUB_TOKEN, "").strip()
    if not token:
        raise InvalidInput(
            f"{GITHUB_TOKEN}: is not set, although {GITHUB_URL} is",
            hint="The runner of GitHub sets both.",
            field=GITHUB_TOKEN,
        )
    return issuers.github(url, checked(token, GITHUB_TOKEN), audience())


def _from_dev_issuer(issuer: str, claims: RequestedClaims, audience: Callable[[], str], where: str) -> Credential:
    from bkpool.cli import issuers  # noqa: PLC0415 - only for trying things out

    def fetch() -> str:
        return str(issuers.mint(issuer, claims.request(audience()), where)["token"])

    return Credential(issuer, fetch, cached=True)


def _note_without_effect(claims: RequestedClaims) -> None:
    for option in claims.options():
        console.note(f"note: {option} has no effect here: the bearer token (BKCTL_TOKEN) says who the caller is.")


def _login() -> str:
    import getpass  # noqa: PLC0415 - only for trying things out

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "developer"


def hint_without_credential(environment: Mapping[str, str], *, other_home: str = "") -> str:
    """The hint for a caller without a credential.

    Args:
        environment: The variables of this process.
        other_home: The endpoint that answered, if nobody gave it and no appliance runs from this home.
    """
    if environment.get("GITHUB_ACTIONS") == "true":
        return "Give the job `permissions: id-token: write`, or set BKCTL_TOKEN."
    if other_home:
        return (
            f"No appliance runs from this home ({home.home()}); the one at {other_home} belongs to another home. "
            "Set BKPOOL_HOME to that home, or set BKCTL_TOKEN."
        )
    return "Set BKCTL_TOKEN. Only the appliance of this machine can be called without it."
