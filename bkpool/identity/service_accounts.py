"""Kubernetes ServiceAccounts as callers: the API server says whose a token is (TokenReview).

Only what claims to be a ServiceAccount's token is shown to it, with the audience that callers must have asked for. No
answer is kept here; the API server itself remembers a good token for 10 s.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping

import structlog

from bkpool.core.errors import BkpoolError, Unavailable
from bkpool.core.names import AUDIENCE
from bkpool.identity import Identity, Verdict, jwt
from bkpool.kube import Doc, KubeApi, paths

log = structlog.get_logger(__name__)

AT_ONCE = 16
"""Questions to the API server at a time: whoever reaches the API can cause one, and must not flood the cluster."""
REVIEW_TIMEOUT = 10.0
"""Seconds for an answer, the wait for one's turn included."""

_SOURCE = "ServiceAccount token"
_PREFIX = "system:serviceaccount:"
_REVIEWS = ("authentication.k8s.io/v1", "tokenreviews")
_LONGEST = 200  # characters of a server's message


class ServiceAccountAuthenticator:
    """Knows the ServiceAccounts of one cluster.

    Args:
        api: The cluster; bkpool may create `tokenreviews` there.
        audience: For whom the tokens must be made.
        timeout: Seconds for an answer, including the wait for a free slot.
    """

    def __init__(self, api: KubeApi, audience: str = AUDIENCE, timeout: float = REVIEW_TIMEOUT) -> None:
        self._timeout = timeout
        self._api = api
        self._audience = audience
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def authenticate(self, bearer: str) -> tuple[Verdict, ...]:
        """See Authenticator."""
        claims = _unverified(bearer)
        if not str(claims.get("sub")).startswith(_PREFIX):
            return ()
        found = judge(await self._reviewed(bearer), self._audience, claims)
        if isinstance(found, Identity):
            return (Verdict(_SOURCE, found),)
        return (Verdict(_SOURCE, refusal=_without(bearer, found)),)

    async def _reviewed(self, bearer: str) -> Doc:
        api_version, plural = _REVIEWS
        review = {
            "apiVersion": api_version,
            "kind": "TokenReview",
            "spec": {"token": bearer, "audiences": [self._audience]},
        }
        away = Unavailable(
            "ServiceAccount tokens cannot be checked just now",
            hint="The Kubernetes API server does not answer the appliance, whose log says why; try again.",
            retry_after=5,
        )
        try:
            async with asyncio.timeout(self._timeout), self._turns:
                return await self._api.create(paths.group(api_version, plural), review)
        except TimeoutError:
            log.warning("service_accounts.not_checked", reason=f"no answer within {self._timeout:g} s")
        except BkpoolError as error:  # also a right that is missing: it is no fault of the caller's
            log.warning("service_accounts.not_checked", reason=_without(bearer, error.message))
        raise away


def judge(review: Doc, audience: str, claims: Mapping[str, object]) -> Identity | str:
    """What the API server's answer means: who it is, or why nobody.

    Args:
        review: The TokenReview with its status.
        audience: What was asked for.
        claims: What the token says itself, unverified; they only explain a refusal.
    """
    status = _mapping(review.get("status"))
    user = _mapping(status.get("user"))
    name = user.get("username")
    if status.get("authenticated") is not True:
        return _why_not(status, audience, claims)
    if audience not in _texts(status.get("audiences")):  # of a server that does not know audiences
        return f"the API server did not check that the ServiceAccount token is for {audience!r}"
    if not isinstance(name, str) or not name.startswith(_PREFIX):
        return "the token is not a ServiceAccount's"
    return Identity(name, authority="kubernetes", source=_SOURCE, groups=_texts(user.get("groups")))


def _why_not(status: Doc, audience: str, claims: Mapping[str, object]) -> str:
    made_for = claims.get("aud")
    made_for = _texts(made_for) if isinstance(made_for, list) else _texts([made_for])
    if audience not in made_for:
        told = jwt.shown(claims.get("aud"))
        return f"the ServiceAccount token is for {told}, not for {audience!r}: ask for one with that audience"
    error = status.get("error")
    told = error[:_LONGEST] if isinstance(error, str) and error.isprintable() else ""
    return f"Kubernetes does not take the ServiceAccount token{': ' * bool(told)}{told}"


def _mapping(value: object) -> Doc:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def _without(bearer: str, text: str) -> str:
    """The text, if no part of the token stands in it."""
    return "no reason is told" if any(part in text for part in bearer.split(".") if part) else text


def _unverified(bearer: str) -> Mapping[str, object]:
    """The claims of a JWT, believed for nothing; empty where it is none."""
    if not jwt.looks_like_one(bearer):
        return {}
    claims = bearer.split(".")[1]
    try:
        return jwt.read_object(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    except ValueError:
        return {}
