"""Authenticates Kubernetes ServiceAccounts by asking the API server (TokenReview).

Only tokens that claim to be a ServiceAccount's are sent to it, with the audience that they must have. No result is
cached here; the API server itself caches a valid token for 10 s.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping

import structlog

from bkpool.core.errors import BkpoolError, Unavailable
from bkpool.core.names import AUDIENCE, Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import CallerMethod, RememberedCaller
from bkpool.identity import Identity, Verdict, jwt
from bkpool.kube import Doc, KubeApi, paths

log = structlog.get_logger(__name__)

MAX_CONCURRENT_REVIEWS = 16
"""Requests to the API server at the same time. Anybody who reaches bkpool's API can cause one, but not a flood."""
REVIEW_TIMEOUT = 10.0
"""Seconds for a review, including the wait for other reviews."""

_SOURCE = "ServiceAccount token"
_PREFIX = "system:serviceaccount:"
_REVIEWS = ("authentication.k8s.io/v1", "tokenreviews")
_LONGEST_MESSAGE = 200  # characters of the server's message


class ServiceAccountAuthenticator:
    """Identifies the ServiceAccounts of one cluster.

    Args:
        api: The cluster. It must allow bkpool to create `tokenreviews`.
        audience: The audience that tokens must have.
        timeout: Seconds for a review, including the wait for other reviews.
    """

    def __init__(self, api: KubeApi, audience: str = AUDIENCE, timeout: float = REVIEW_TIMEOUT) -> None:
        self._timeout = timeout
        self._api = api
        self._audience = audience
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_REVIEWS)

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:  # noqa: ARG002
        """See Authenticator."""
        claims = _unverified(bearer)
        if not str(claims.get("sub")).startswith(_PREFIX):
            return ()
        found = judge(await self._reviewed(bearer), self._audience, claims)
        if isinstance(found, Identity):
            return (Verdict(_SOURCE, found),)
        return (Verdict(_SOURCE, refusal=_without(bearer, found)),)

    async def recall(self, caller: RememberedCaller, pool: Pool) -> tuple[Verdict, ...]:  # noqa: ARG002
        """See Authenticator. The API server is not asked, because there is no token to show it."""
        if caller.method is not CallerMethod.SERVICE_ACCOUNT:
            return ()
        return (Verdict(_SOURCE, _identity(caller.user, caller.groups)),)

    async def _reviewed(self, bearer: str) -> Doc:
        api_version, plural = _REVIEWS
        review = {
            "apiVersion": api_version,
            "kind": "TokenReview",
            "spec": {"token": bearer, "audiences": [self._audience]},
        }
        unavailable = Unavailable(
            "ServiceAccount tokens cannot be checked now",
            hint="Try again. The appliance cannot reach the Kubernetes API server; its log says why.",
            retry_after=5,
        )
        try:
            async with asyncio.timeout(self._timeout), self._slots:
                return await self._api.create(paths.group(api_version, plural), review)
        except TimeoutError:
            log.warning("service_accounts.not_checked", reason=f"no answer within {self._timeout:g} s")
        except BkpoolError as error:  # a missing right, too: the caller is not at fault
            log.warning("service_accounts.not_checked", reason=_without(bearer, error.message))
        raise unavailable


def judge(review: Doc, audience: str, claims: Mapping[str, object]) -> Identity | str:
    """Interprets a TokenReview: the identity, or the reason why there is none.

    Args:
        review: The TokenReview with its status.
        audience: The audience that was requested.
        claims: The unverified claims of the token. They are used only to explain a refusal.
    """
    status = _mapping(review.get("status"))
    user = _mapping(status.get("user"))
    name = user.get("username")
    if status.get("authenticated") is not True:
        return _refusal_reason(status, audience, claims)
    if audience not in _texts(status.get("audiences")):  # the server does not support audiences
        return f"the API server did not check that the ServiceAccount token is for {audience!r}"
    if not isinstance(name, str) or not name.startswith(_PREFIX):
        return "the token is not a ServiceAccount's"
    return _identity(name, _texts(user.get("groups")))


def _identity(name: str, groups: tuple[str, ...]) -> Identity:
    method = CallerMethod.SERVICE_ACCOUNT
    return Identity(name, authority="kubernetes", source=_SOURCE, groups=groups, method=method)


def _refusal_reason(status: Doc, audience: str, claims: Mapping[str, object]) -> str:
    made_for = claims.get("aud")
    made_for = _texts(made_for) if isinstance(made_for, list) else _texts([made_for])
    if audience not in made_for:
        found = jwt.shown(claims.get("aud"))
        return f"the ServiceAccount token is for {found}, not for {audience!r}: request one with that audience"
    error = status.get("error")
    reason = error[:_LONGEST_MESSAGE] if isinstance(error, str) and error.isprintable() else ""
    return f"Kubernetes refuses the ServiceAccount token{': ' * bool(reason)}{reason}"


def _mapping(value: object) -> Doc:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def _without(bearer: str, text: str) -> str:
    """The text, unless it contains a part of the token."""
    return (
        "the reason is not shown, because it contains a part of the token"
        if any(part in text for part in bearer.split(".") if part)
        else text
    )


def _unverified(bearer: str) -> Mapping[str, object]:
    """The claims of a JWT, without any verification; empty if it is not a JWT."""
    if not jwt.looks_like_one(bearer):
        return {}
    claims = bearer.split(".")[1]
    try:
        return jwt.read_object(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    except ValueError:
        return {}
