"""Which bearer token goes to which appliance: what the user says, else what the place we run in gives.

The admin's token goes to the appliance of this home and to nobody else. A token is never shown, and never in argv.
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
from bkpool.core.names import AUDIENCE

GIVEN = ("BKCTL_TOKEN", "BKCTL_TOKEN_FILE")
GITHUB_URL, GITHUB_TOKEN = "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
GITLAB = "BKPOOL_ID_TOKEN"
"""The name that our snippet for GitLab gives its token (`id_tokens`)."""
POD = Path("/var/run/secrets/bkpool/token")
"""Where a pod has a token of its ServiceAccount for our audience projected to."""
ENDS_SOON = 30.0
"""Seconds of life below which a token is not used for another call."""
LONGEST = 16_384
"""Characters of a token; the API reads no more."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 2.1
_FIX = "It must hold the token alone, without quotes or line ends."


def audience() -> str:
    """For whom tokens are asked: $BKCTL_AUDIENCE, else what an appliance expects where nothing else is set."""
    return os.environ.get("BKCTL_AUDIENCE") or AUDIENCE


class Credential:
    """A bearer token that is always one to use now.

    Args:
        name: Where it comes from, for errors.
        fetch: Gets it.
        kept: Whether it is used again until it ends, since getting one is work; else it is got for every call.
    """

    def __init__(self, name: str, fetch: Callable[[], str], *, kept: bool = False) -> None:
        self.name = name
        self._fetch = fetch
        self._kept = kept
        self._token: str | None = None

    def bearer(self, *, anew: bool = False) -> str:
        """The token; with `anew`, after a refusal, not one that was there before, if there can be another.

        Raises:
            InvalidInput: It cannot be read, or is none; the message names where it should be.
            Unavailable: Whoever issues it does not answer.
        """
        if self._token is None or anew or not self._kept or ends_soon(self._token, time()):
            self._token = checked(self._fetch(), self.name)
        return self._token


@dataclass(frozen=True, slots=True)
class Asked:
    """Who a caller wants to be for a development issuer, as the older bkctl's options say it."""

    actor: str | None = None
    repository: str | None = None
    subject: str | None = None

    def options(self) -> list[str]:
        """Those that were given."""
        return [f"--oidc-{name}" for name in ("actor", "repository", "subject") if getattr(self, name)]

    def request(self, **more: Any) -> dict[str, Any]:
        """The body of the issuer's POST /token; its subject is what is given, else as a job on GitHub has it."""
        job = f"repo:{self.repository}:ref:refs/heads/main" if self.repository else None
        claims = {"actor": self.actor or self.subject or _login(), "repository": self.repository}
        given = {name: value for name, value in claims.items() if value}
        return {"sub": self.subject or job or given["actor"], "aud": audience(), "claims": given, **more}


def find(appliance: home.Appliance | None, asked: Asked | None = None, *, own: bool) -> Credential | None:
    """The credential for a call.

    Args:
        appliance: What runs from this home.
        asked: Who the caller wants to be.
        own: Whether that appliance is whom the call goes to.

    Raises:
        InvalidInput: A variable of the environment is no good; the message names it.
    """
    given = _given()
    if asked and asked.options():
        issuer = os.environ.get("BKCTL_OIDC_ISSUER") or (appliance.dev_issuer if appliance and own else None)
        if given is None and issuer:
            return _minted(issuer, asked)
        _explain(asked)
    if given is not None:
        return given
    return (admin() if own else None) or _of_surroundings()


def admin() -> Credential | None:
    """The admin's token of this home, for its own appliance alone; None where this user may not read it."""
    token = home.admin_token()
    return Credential("admin.token", lambda: token) if token else None


def ends_soon(token: str, now: float) -> bool:
    """Whether a JWT says that it has ended or is about to; what is no JWT never does. Nothing is verified."""
    try:
        part = token.split(".")[1]
        ends = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))["exp"]
        return bool(ends < now + ENDS_SOON)
    except (IndexError, KeyError, TypeError, ValueError):
        return False


def read(path: Path, variable: str) -> str:
    """What is in a file that should hold a token. Raises InvalidInput, which names the variable (or option)."""
    try:
        with path.open(encoding="ascii") as file:
            return file.read(LONGEST + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not a text"
        raise InvalidInput(f"{variable}: {path} cannot be read: {why}", hint=_FIX, field=variable) from None


def checked(token: str, variable: str) -> str:
    """The token, if it could be one. Raises InvalidInput, which does not quote it."""
    if len(token) <= LONGEST and _TOKEN.fullmatch(token):
        return token
    problem = "is longer than any token" if len(token) > LONGEST else "has characters that no bearer token has"
    raise InvalidInput(f"{variable}: {problem if token else 'holds no token'}", hint=_FIX, field=variable)


def _given() -> Credential | None:
    """What the user says himself, before everything else."""
    if token := os.environ.get(GIVEN[0], "").strip():
        checked(token, GIVEN[0])
        return Credential(GIVEN[0], lambda: token)
    if file := os.environ.get(GIVEN[1]):
        return Credential(GIVEN[1], lambda: read(Path(file), GIVEN[1]))
    return None


def _of_surroundings() -> Credential | None:
    """The token that the platform gives a job: GitHub Actions, GitLab CI, or a pod."""
    if url := os.environ.get(GITHUB_URL):
        return Credential(GITHUB_URL, lambda: _github(url), kept=True)
    if token := os.environ.get(GITLAB, "").strip():
        return Credential(GITLAB, lambda: token)
    if POD.exists():
        return Credential(str(POD), lambda: read(POD, str(POD)))
    return None


def _github(url: str) -> str:
    from bkpool.cli import issuers  # noqa: PLC0415 - only there

    token = os.environ.get(GITHUB_TOKEN, "").strip()
    if not token:
        raise InvalidInput(
            f"{GITHUB_TOKEN}: is not set, and {GITHUB_URL} is", hint="GitHub's runner sets both.", field=GITHUB_TOKEN
        )
    return issuers.github(url, checked(token, GITHUB_TOKEN), audience())


def _minted(issuer: str, asked: Asked) -> Credential:
    from bkpool.cli import issuers  # noqa: PLC0415 - only for trying things out

    return Credential(issuer, lambda: str(issuers.mint(issuer, asked.request())["token"]), kept=True)


def _explain(asked: Asked) -> None:
    for option in asked.options():
        console.note(f"note: {option} has no effect here: who calls is what the bearer token (BKCTL_TOKEN) says.")


def _login() -> str:
    import getpass  # noqa: PLC0415 - only for trying things out

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "developer"


def without_one(environment: Mapping[str, str]) -> str:
    """The hint for a caller who has none."""
    if environment.get("GITHUB_ACTIONS") == "true":
        return "Give the job `permissions: id-token: write`, or set BKCTL_TOKEN."
    return "Set BKCTL_TOKEN; only the appliance of this machine is called without it."
