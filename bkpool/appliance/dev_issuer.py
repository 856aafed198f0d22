"""An OIDC issuer for trying things out: it makes a token for whoever asks, as a CI platform would for a job.

Its key is in memory only, so its tokens end with the appliance. It is never served beyond this machine, and answers
no request that a web page of elsewhere could make.
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
"""Life of a token at most: as long as a lease may be."""
ACTIONS_LIFE = timedelta(minutes=5)
"""Of GitHub's ID tokens (docs.github.com, "OpenID Connect reference": `exp` is five minutes after `iat`)."""
_OURS = ("iss", "sub", "aud", "exp", "iat", "nbf", "jti")
_MAX_BODY = 16 * 1024  # bytes: a token with as much in it would fit into no header

Text = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class MintBody(BaseModel):
    """What POST /token takes."""

    model_config = ConfigDict(extra="forbid")

    sub: Text
    aud: Text = AUDIENCE
    claims: dict[str, Any] = Field(default_factory=dict)
    duration: Duration = timedelta(hours=1)


def dev_config(url: str, namespace: str = SYSTEM_NAMESPACE) -> OIDCConfig:
    """That the appliance believes this issuer: its tokens' `actor` is the user, for every pool without rules.

    Args:
        url: As make_dev_issuer was given it.
        namespace: The appliance's own.
    """
    spec = OIDCConfigSpec(issuer=url, audience=AUDIENCE, claims_mapping=ClaimsMapping(user="actor"), pools=("*",))
    return OIDCConfig(metadata=Metadata(name="dev-issuer", namespace=namespace), spec=spec)


def make_dev_issuer(url: str, now: Callable[[], datetime]) -> web.Application:
    """The issuer as an application, with a fresh key.

    Args:
        url: Where it is served: what its tokens say as `iss`.
        now: The clock.
    """
    issuer = _Issuer(url, now)
    app = web.Application(client_max_size=_MAX_BODY, middlewares=[_guarded])
    app.router.add_get("/.well-known/openid-configuration", issuer.configuration)
    app.router.add_get("/.well-known/jwks.json", issuer.keys)
    app.router.add_post("/token", issuer.token)
    app.router.add_get("/actions/token", issuer.actions_token)
    log.warning("dev_issuer.made", issuer=url, believes="whoever asks on this machine")
    return app


class _Issuer:
    def __init__(self, url: str, now: Callable[[], datetime]) -> None:
        self._url = url
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
        """A token as asked for."""
        body = await _body(request)
        token = self._signed(body.sub, body.aud, body.duration, {"actor": body.sub, **body.claims})
        return web.json_response({"token": token, "expiresIn": int(body.duration.total_seconds())})

    async def actions_token(self, request: web.Request) -> web.Response:
        """As GitHub has it at ACTIONS_ID_TOKEN_REQUEST_URL; the query may also say `actor`, `repository`, `ref`."""
        if not request.headers.get("Authorization", "").lower().startswith("bearer "):
            raise Unauthenticated("Authorization: there is no bearer token", hint="Any will do here.")
        claims = _of_a_job(request.query)
        audience = request.query.get("audience") or f"https://github.com/{claims['repository_owner']}"
        return web.json_response({"value": self._signed(claims.pop("sub"), audience, ACTIONS_LIFE, claims)})

    def _signed(self, subject: str, audience: str, life: timedelta, claims: Mapping[str, Any]) -> str:
        now = self._now()
        ours = {"iss": self._url, "sub": subject, "aud": audience, "jti": secrets.token_hex(16)}
        times = {"iat": int(now.timestamp()), "exp": int((now + life).timestamp())}
        return jwt.encode({**claims, **ours, **times}, self._key, "RS256", headers={"kid": self._key_id})


def _of_a_job(query: Mapping[str, str]) -> dict[str, str]:
    """Claims as GitHub's tokens have them."""
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
    if request.content_type != "application/json":  # a page of another origin would first have to ask whether it may
        raise InvalidInput("Content-Type: it is not application/json", hint="Send JSON.", field="Content-Type")
    try:
        body = MintBody.model_validate(json.loads(await request.read()))
    except ValidationError as error:
        raise explain(error) from None
    except (ValueError, RecursionError):
        raise InvalidInput("body: it is not JSON", hint="Send a JSON object.", field="body") from None
    for name in _OURS:
        if name in body.claims:
            raise InvalidInput(
                f"claims.{name}: is the issuer's to say",
                hint="Use sub, aud and duration beside claims.",
                field=f"claims.{name}",
            )
    if not timedelta(seconds=1) <= body.duration <= LONGEST:
        raise InvalidInput("duration: must be from 1s to 24h", hint="Such as 1h.", field="duration")
    return body


@web.middleware
async def _guarded(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        _check_host(request.host)
        return await handler(request)
    except BkpoolError as error:
        told = {"code": error.code, "message": error.message, "hint": error.hint}
        field = {"field": error.field} if error.field else {}
        return web.json_response({"error": told | field}, status=error.status)
    except web.HTTPException as error:
        told = {"code": error.reason.replace(" ", ""), "message": f"{request.method} {request.path}: {error.reason}"}
        return web.json_response({"error": told}, status=error.status)


def _check_host(host: str) -> None:
    """A page whose name was made to lead here (DNS rebinding) still says that name. Raises Forbidden."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in LOOPBACK:
        raise Forbidden("Host: the development issuer is called localhost", hint="Ask it by http://localhost:PORT.")
