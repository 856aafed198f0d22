"""Gets a token from its issuer: from the runner of GitHub for its job, or from a development issuer.

Answers are bounded in bytes and time. No redirect is followed, so a request goes to the named host only. An error
never quotes a token.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import sleep
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from bkpool.cli.threads import in_thread
from bkpool.core.errors import BkpoolError, InvalidInput, Unavailable
from bkpool.core.names import LOOPBACK
from bkpool.core.urls import is_protected

ANSWER_TIMEOUT = 15.0
"""Seconds for one answer, from the look-up of the name to the last byte."""
RETRY_PAUSES = (1.0, 3.0)
"""Seconds before each new attempt at GitHub, whose own client makes ten attempts (@actions/core, oidc-utils)."""
_MAX_ANSWER = 64 * 1024  # bytes


def github(url: str, request_token: str, audience: str) -> str:
    """The ID token of the job in which this runs.

    Args:
        url: $ACTIONS_ID_TOKEN_REQUEST_URL.
        request_token: $ACTIONS_ID_TOKEN_REQUEST_TOKEN.
        audience: The audience of the token.

    Raises:
        InvalidInput: A secret must not be sent to this URL.
        Unavailable: There was no answer, or an answer without a token.
    """
    variable = "ACTIONS_ID_TOKEN_REQUEST_URL"
    _check(url, variable)
    separator = "&" if urlsplit(url).query else "?"
    target = f"{url}{separator}audience={quote(audience, safe='')}"
    headers = {"Authorization": f"Bearer {request_token}", "Accept": "application/json"}
    hint = "Check that the job has `permissions: id-token: write` and is still running."
    for pause in RETRY_PAUSES:
        with suppress(Unavailable):
            return _text(_request(target, headers, None, variable, hint), "value", variable)
        sleep(pause)
    return _text(_request(target, headers, None, variable, hint), "value", variable)


def mint(issuer: str, body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A token of a development issuer: {"token", "expiresIn"}.

    Args:
        issuer: Its URL.
        body: The body of POST /token.
        where: What gave the URL, for error messages.

    Raises:
        InvalidInput: The URL is not allowed, or the issuer refuses the request; the message has the reason.
        Unavailable: The issuer does not answer.
    """
    _check(issuer, where)
    variable = f"the issuer {issuer}"
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    hint = "Start one with `bkpool up --dev-issuer`."
    answer = _request(f"{issuer.rstrip('/')}/token", headers, json.dumps(body).encode(), variable, hint)
    _text(answer, "token", variable)
    return answer


def _check(url: str, variable: str) -> None:
    try:
        parts = urlsplit(url)
        safe = parts.username is None and is_protected(parts)
        valid = safe and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        valid = False
    if not valid:
        raise InvalidInput(
            f"{variable}: is not a URL with https:// (http:// only on this machine)",
            hint="Give a URL with https://, so that nobody on the way can read the token.",
            field=variable,
        )


def _request(url: str, headers: Mapping[str, str], body: bytes | None, variable: str, hint: str) -> dict[str, Any]:
    status, content = _within_timeout(lambda: _exchange(url, headers, body), variable, hint)
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if status == 200 and isinstance(answer, dict):  # noqa: PLR2004 - the number of HTTP
        return answer
    why = answer.get("error") if isinstance(answer, dict) else None
    if status == 400 and isinstance(why, dict) and isinstance(why.get("message"), str):  # noqa: PLR2004
        raise InvalidInput(why["message"], hint=str(why.get("hint") or ""), field=why.get("field"))
    raise Unavailable(f"{variable}: the answer has no token (HTTP {status})", hint=hint)


def _exchange(url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[int, bytes]:
    """One request, through the proxy of the environment; a request to this machine uses no proxy."""
    from urllib import error, request  # noqa: PLC0415 - only for requests to an issuer

    class NoRedirect(request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            """Does not follow; the redirect itself is the answer."""

    direct = [request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
    opener = request.build_opener(NoRedirect, *direct)
    target, named = _addressed(url)
    prepared = request.Request(target, body, {**headers, **named})  # noqa: S310 - _check has checked the scheme
    try:
        with opener.open(prepared, timeout=ANSWER_TIMEOUT) as answer:
            return answer.status, answer.read(_MAX_ANSWER)
    except error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read(_MAX_ANSWER)


def _addressed(url: str) -> tuple[str, dict[str, str]]:
    """The URL with 127.0.0.1 for `localhost`, and the header that keeps the name: no resolver says where that is.

    With https the certificate says whether it is the right server.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname != "localhost":
        return url, {}
    address = "127.0.0.1" if parts.port is None else f"127.0.0.1:{parts.port}"
    return urlunsplit(parts._replace(netloc=address)), {"Host": parts.netloc}


def _within_timeout(work: Callable[[], tuple[int, bytes]], variable: str, hint: str) -> tuple[int, bytes]:
    """The result of the work. The time-out of a socket does not end an answer that sends one byte a minute."""
    try:
        return in_thread(work, ANSWER_TIMEOUT)
    except BkpoolError:
        raise
    except Exception as fault:  # noqa: BLE001 - whatever urllib raises, there is no answer
        raise Unavailable(f"{variable}: no answer: {_reason(fault)}", hint=hint) from None


def _reason(fault: Exception) -> str:
    cause = getattr(fault, "reason", fault)  # urllib wraps the error of the socket
    if isinstance(cause, TimeoutError):
        return f"not within {ANSWER_TIMEOUT:g} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"TLS: {cause.verify_message}"
    return getattr(cause, "strerror", None) or type(cause).__name__


def _text(answer: Mapping[str, Any], name: str, variable: str) -> str:
    value = answer.get(name)
    if isinstance(value, str) and value:
        return value
    raise Unavailable(f"{variable}: the answer has no {name}", hint="Check that this is the URL of an issuer.")
