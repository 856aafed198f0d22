"""Getting a token from whoever issues it: GitHub's runner for its job, or a development issuer for anybody.

Answers are bounded in bytes and time, and no redirect is followed: what is sent goes to the named host alone. A token
never stands in an error.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Thread
from time import sleep
from typing import Any
from urllib.parse import quote, urlsplit

from bkpool.core.errors import BkpoolError, InvalidInput, Unavailable
from bkpool.core.names import LOOPBACK

PATIENCE = 15.0
"""Seconds for one answer, from the name's look-up to its last byte."""
PAUSES = (1.0, 3.0)
"""Seconds before a further try at GitHub, whose own client tries ten times (@actions/core, oidc-utils)."""
_LONGEST = 64 * 1024


def github(url: str, request_token: str, audience: str) -> str:
    """The ID token of the job that this runs in.

    Args:
        url: $ACTIONS_ID_TOKEN_REQUEST_URL.
        request_token: $ACTIONS_ID_TOKEN_REQUEST_TOKEN.
        audience: For whom the token is to be.

    Raises:
        InvalidInput: The URL is none that a secret may be sent to.
        Unavailable: There was no answer, or none with a token.
    """
    variable = "ACTIONS_ID_TOKEN_REQUEST_URL"
    _check(url, variable)
    separator = "&" if urlsplit(url).query else "?"
    asked = f"{url}{separator}audience={quote(audience, safe='')}"
    headers = {"Authorization": f"Bearer {request_token}", "Accept": "application/json"}
    hint = "Does the job have `permissions: id-token: write`, and is it still running?"
    for pause in PAUSES:
        with suppress(Unavailable):
            return _text(_ask(asked, headers, None, variable, hint), "value", variable)
        sleep(pause)
    return _text(_ask(asked, headers, None, variable, hint), "value", variable)


def mint(issuer: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A token of a development issuer: {"token", "expiresIn"}.

    Args:
        issuer: Its URL.
        body: What POST /token takes.

    Raises:
        InvalidInput: The URL is not an issuer's, or the issuer says what is wrong with the request.
        Unavailable: Nobody answers there.
    """
    _check(issuer, "--issuer (or BKCTL_OIDC_ISSUER)")
    variable = f"the issuer {issuer}"
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    hint = "Start one with `bkpool up --dev-issuer`."
    told = _ask(f"{issuer.rstrip('/')}/token", headers, json.dumps(body).encode(), variable, hint)
    _text(told, "token", variable)
    return told


def _check(url: str, variable: str) -> None:
    try:
        parts = urlsplit(url)
        safe = parts.username is None and (
            parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
        )
        valid = safe and bool(parts.hostname) and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        valid = False
    if not valid:
        raise InvalidInput(
            f"{variable}: is not a URL with https:// (http:// only on this machine)",
            hint="Tokens are not asked for in clear.",
            field=variable,
        )


def _ask(url: str, headers: Mapping[str, str], body: bytes | None, variable: str, hint: str) -> dict[str, Any]:
    status, answer = _in_time(lambda: _exchange(url, headers, body), variable, hint)
    try:
        told = json.loads(answer)
    except ValueError:
        told = None
    if status == 200 and isinstance(told, dict):  # noqa: PLR2004 - HTTP's own number
        return told
    why = told.get("error") if isinstance(told, dict) else None
    if status == 400 and isinstance(why, dict) and isinstance(why.get("message"), str):  # noqa: PLR2004
        raise InvalidInput(why["message"], hint=str(why.get("hint") or ""), field=why.get("field"))
    raise Unavailable(f"{variable}: it gave no token (HTTP {status})", hint=hint)


def _exchange(url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[int, bytes]:
    """One request; through the proxy of the environment, if there is one, but to this machine never."""
    from urllib import error, request  # noqa: PLC0415 - only who asks an issuer needs it

    class NoRedirect(request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            """The answer that redirects is the answer."""

    direct = [request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
    opener = request.build_opener(NoRedirect, *direct)
    asked = request.Request(url, body, dict(headers))  # noqa: S310 - _check has seen the scheme
    try:
        with opener.open(asked, timeout=PATIENCE) as answer:
            return answer.status, answer.read(_LONGEST)
    except error.HTTPError as refused:
        with refused:
            return refused.code, refused.read(_LONGEST)


def _in_time(work: Callable[[], tuple[int, bytes]], variable: str, hint: str) -> tuple[int, bytes]:
    """The work's result, also where a server sends a byte a minute: no time-out of a socket ends that."""
    results: list[tuple[int, bytes]] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as fault:  # noqa: BLE001 - what it is is judged in the caller's thread
            faults.append(fault)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if results:
        return results[0]
    fault = faults[0] if faults else TimeoutError()
    if isinstance(fault, BkpoolError):
        raise fault
    raise Unavailable(f"{variable}: no answer: {_reason(fault)}", hint=hint) from None


def _reason(fault: Exception) -> str:
    cause = getattr(fault, "reason", fault)  # urllib wraps what the socket said
    if isinstance(cause, TimeoutError):
        return f"not within {PATIENCE:g} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"TLS: {cause.verify_message}"
    return getattr(cause, "strerror", None) or type(cause).__name__


def _text(told: Mapping[str, Any], name: str, variable: str) -> str:
    value = told.get(name)
    if isinstance(value, str) and value:
        return value
    raise Unavailable(f"{variable}: the answer has no {name}", hint="Is that an issuer?")
