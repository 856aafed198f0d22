"""An OIDC issuer for development: it makes a token for anybody, as a CI platform does for a job.

Its key is only in memory, so its tokens become invalid when the appliance ends. It is never served beyond this
machine, and it refuses requests that a web page of another site could send.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any
from urllib.parse import urlsplit

import jwt
import structlog
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from bkpool.core.auth import ClaimsMapping, OIDCConfig, OIDCConfigSpec
from bkpool.core.errors import BkpoolError, Forbidden, InvalidInput, Unauthenticated
from bkpool.core.names import AUDIENCE, LOOPBACK, SYSTEM_NAMESPACE
from bkpool.core.resource import Duration, Metadata, explain

log = structlog.get_logger(__name__)

LONGEST = timedelta(hours=24)
"""The longest life of a token: the same as that of a lease."""
ACTIONS_LIFE = timedelta(minutes=5)
"""The life of GitHub's ID tokens (docs.github.com, "OpenID Connect reference": `exp` is five minutes after `iat`)."""
_ISSUER_CLAIMS = ("iss", "sub", "aud", "exp", "iat", "nbf", "jti")
_MAX_BODY = 16 * 1024  # bytes: a token of that size fits into no header

Text = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class MintBody(BaseModel):
    """The body of POST /token."""

    model_config = ConfigDict(extra="forbid")

    sub: Text
    aud: Text | None = None
    """None: the audience of the appliance's own API."""
    claims: dict[str, Any] = Field(default_factory=dict)
    duration: Duration = timedelta(hours=1)


def dev_config(url: str, namespace: str = SYSTEM_NAMESPACE) -> OIDCConfig:
    """The configuration that trusts this issuer: `actor` of its tokens is the user, for every pool without rules.

    Args:
        url: The same as for make_dev_issuer.
        namespace: The appliance's own namespace.
    """
    spec = OIDCConfigSpec(issuer=url, claims_mapping=ClaimsMapping(user="actor"), pools=("*",))
    return OIDCConfig(metadata=Metadata(name="dev-issuer", namespace=namespace), spec=spec)


def make_dev_issuer(url: str, now: Callable[[], datetime], audience: str = AUDIENCE) -> web.Application:
    """The issuer as an application, with a new key.

    Args:
        url: Where it is served, and the `iss` of its tokens.
        now: The clock.
        audience: That of tokens for which nobody asks for another one.
    """
    issuer = _Issuer(url, now, audience)
    app = web.Application(client_max_size=_MAX_BODY, middlewares=[_guarded])
    app.router.add_get("/.well-known/openid-configuration", issuer.configuration)
    app.router.add_get("/.well-known/jwks.json", issuer.keys)
    app.router.add_post("/token", issuer.token)
    app.router.add_get("/actions/token", issuer.actions_token)
    log.warning("dev_issuer.opened", issuer=url, note="it makes a token for anybody on this machine")
    return app


class _Issuer:
    def __init__(self, url: str, now: Callable[[], datetime], audience: str) -> None:
        self._url = url
        self._audience = audience
        self._now = now
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._key_id = secrets.token_hex(8)

    async def configuration(self, _request: web.Request) -> web.Response:
        """OpenID Connect Discovery 1.0, section 3."""
        return web.json_response(
            {
                "issuer": self._url,
                "jwks_uri": f"{self._url}/.well-known/jwks.json",
                "token_endpoint": f"{self._url}/token",
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
            }
        )

    async def keys(self, _request: web.Request) -> web.Response:
        """The public key (RFC 7517)."""
        key = RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return web.json_response({"keys": [{**key, "kid": self._key_id, "use": "sig", "alg": "RS256"}]})

    async def token(self, request: web.Request) -> web.Response:
        """A token with the requested claims."""
        body = await _body(request)
        token = self._signed(body.sub, body.aud or self._audience, body.duration, {"actor": body.sub, **body.claims})
        return web.json_response({"token": token, "expiresIn": int(body.duration.total_seconds())})

    async def actions_token(self, request: web.Request) -> web.Response:
        """Answers like GitHub's ACTIONS_ID_TOKEN_REQUEST_URL. The query may set `actor`, `repository` and `ref`."""
        if not request.headers.get("Authorization", "").lower().startswith("bearer "):
            raise Unauthenticated(
                "Authorization: there is no bearer token", hint="Send any; this issuer does not check it."
            )
        claims = _job_claims(request.query)
        audience = request.query.get("audience") or f"https://github.com/{claims['repository_owner']}"
        return web.json_response({"value": self._signed(claims.pop("sub"), audience, ACTIONS_LIFE, claims)})

    def _signed(self, subject: str, audience: str, life: timedelta, claims: Mapping[str, Any]) -> str:
        now = self._now()
        issued = {"iss": self._url, "sub": subject, "aud": audience, "jti": secrets.token_hex(16)}
        times = {"iat": int(now.timestamp()), "exp": int((now + life).timestamp())}
        return jwt.encode({**claims, **issued, **times}, self._key, "RS256", headers={"kid": self._key_id})


def _job_claims(query: Mapping[str, str]) -> dict[str, str]:
    """The claims of GitHub's tokens."""
    repository, ref = query.get("repository", "octo-org/octo-repo"), query.get("ref", "refs/heads/main")
    return {
        "sub": f"repo:{repository}:ref:{ref}",
        "actor": query.get("actor", "octocat"),
        "repository": repository,
        "repository_owner": repository.partition("/")[0],
        "ref": ref,
        "event_name": "push",
        "run_id": "1",
        "run_attempt": "1",
    }


async def _body(request: web.Request) -> MintBody:
    """The body of POST /token. Raises InvalidInput."""
    if (
        request.content_type != "application/json"
    ):  # a web page of another origin needs a CORS preflight for this type
        raise InvalidInput("Content-Type: must be application/json", hint="Send JSON.", field="Content-Type")
    try:
        body = MintBody.model_validate(json.loads(await request.read()))
    except ValidationError as error:
        raise explain(error) from None
    except (ValueError, RecursionError):
        raise InvalidInput("the request body is not JSON", hint="Send a JSON object.", field="body") from None
    for name in _ISSUER_CLAIMS:
        if name in body.claims:
            raise InvalidInput(
                f"claims.{name}: only the issuer sets this claim",
                hint="Use the fields sub, aud and duration of the body.",
                field=f"claims.{name}",
            )
    if not timedelta(seconds=1) <= body.duration <= LONGEST:
        raise InvalidInput("duration: must be between 1s and 24h", hint="For example 1h.", field="duration")
    return body


@web.middleware
async def _guarded(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        _check_host(request.host)
        return await handler(request)
    except BkpoolError as error:
        detail = {"code": error.code, "message": error.message, "hint": error.hint}
        field = {"field": error.field} if error.field else {}
        return web.json_response({"error": detail | field}, status=error.status)
    except web.HTTPException as error:
        detail = {
            "code": error.reason.replace(" ", ""),
            "message": f"{request.method} {request.path}: {error.reason}",
        }
        return web.json_response({"error": detail}, status=error.status)


def _check_host(host: str) -> None:
    """Refuses the requests of a web page whose name was pointed at this machine (DNS rebinding). Raises Forbidden."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in LOOPBACK:
        raise Forbidden("Host: the development issuer only answers to localhost", hint="Use http://localhost:PORT.")
