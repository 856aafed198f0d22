"""The routes and the one place where errors become answers.

Each route is a few lines: read the body, ask the lease service, write the answer. No write time-out of ours ends an
allocate that waits; a caller who hangs up cancels it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from bkpool.allocation import Claims, Leases
from bkpool.allocation.leases import find_pool
from bkpool.api import models
from bkpool.api.openapi import Route, document
from bkpool.core.errors import BkpoolError, Forbidden, InvalidInput, Unavailable
from bkpool.core.names import DEFAULT_NAMESPACE, Key
from bkpool.core.objects import Pool
from bkpool.core.policy import counts
from bkpool.core.resource import explain
from bkpool.identity import Authenticator, Identity
from bkpool.identity.access import authenticate, may_use
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

MAX_BODY = 64 * 1024
"""Bytes of a request body: many times what a CSR and 64 pieces of metadata take."""

B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need."""

    claims: Claims
    leases: Leases
    mirror: Mirror
    authenticators: Sequence[Authenticator]
    gateway_endpoint: Callable[[Pool], str]
    """Where a caller reaches the gateway of a pool."""
    connections: Callable[[Pool], int]
    """Open connections of a pool."""
    trouble: Callable[[], str | None]
    """Why the appliance can't lease anything now; None when it can."""
    leaving: Callable[[], str | None] = lambda: None
    """Why no more should be sent here, although it is still served."""

    def routes(self) -> list[Route]:
        """Every route, with what goes in and out."""
        return [
            Route("POST", "/api/v1/workers/allocate", self.allocate, models.AllocateBody, models.AllocateAnswer),
            Route("POST", "/api/v1/workers/renew", self.renew, models.RenewBody, models.RenewAnswer, open=True),
            Route("POST", "/api/v1/workers/lookup", self.lookup, models.TokenBody, models.LookupAnswer, open=True),
            Route("POST", "/api/v1/workers/release", self.release, models.TokenBody, models.StatusAnswer, open=True),
            Route("GET", "/api/v1/pools", self.pools, None, models.PoolsAnswer),
            Route("GET", "/api/v1/pools/{name}", self.pool, None, models.PoolAnswer),
            Route("GET", "/api/v1/health", self.health, None, models.StatusAnswer, open=True),
            Route("GET", "/health", self.health, None, models.StatusAnswer, open=True),
            Route("GET", "/api/v1/ready", self.ready, None, models.StatusAnswer, open=True),
            Route("GET", "/ready", self.ready, None, models.StatusAnswer, open=True),
        ]

    async def allocate(self, request: web.Request) -> models.AllocateAnswer:
        """Lease a worker; waits until one is ready."""
        caller = await self._caller(request)
        self._check_ready()
        wanted = (await _read(request, models.AllocateBody)).request()
        may_use(caller, wanted.pool)
        grant = await self.claims.allocate(caller, wanted)
        return models.AllocateAnswer.of(grant, self.gateway_endpoint(find_pool(self.mirror, wanted.pool)))

    async def renew(self, request: web.Request) -> models.RenewAnswer:
        """Let a lease run longer."""
        body = await _read(request, models.RenewBody)
        worker, expires_at = await self.leases.renew(body.token, body.ttl)
        return models.RenewAnswer(worker_name=worker.key.name, expires_at=expires_at)

    async def lookup(self, request: web.Request) -> models.LookupAnswer:
        """Where a lease leads."""
        worker = await self.leases.lookup((await _read(request, models.TokenBody)).token)
        return models.LookupAnswer(
            worker_endpoint=worker.status.endpoint or "", worker_name=worker.key.name, pool_name=worker.pool.name
        )

    async def release(self, request: web.Request) -> models.StatusAnswer:
        """End a lease."""
        await self.leases.release((await _read(request, models.TokenBody)).token)
        return models.StatusAnswer(status="released")

    async def pools(self, request: web.Request) -> models.PoolsAnswer:
        """The pools that the caller may use."""
        caller = await self._caller(request)
        seen = [pool for _, pool in sorted(self.mirror.pools.items()) if _allowed(caller, pool)]
        return models.PoolsAnswer(pools=tuple(models.PoolView.of(pool, **self._live(pool)) for pool in seen))

    async def pool(self, request: web.Request) -> models.PoolAnswer:
        """One pool and its workers."""
        caller = await self._caller(request)
        namespace = request.query.get("namespace") or DEFAULT_NAMESPACE
        pool = find_pool(self.mirror, Key(namespace, request.match_info["name"]))
        may_use(caller, pool.key)
        workers = sorted(self.mirror.workers_of(pool.key), key=lambda worker: worker.slot)
        members = tuple(models.WorkerView.of(worker) for worker in workers)
        return models.PoolAnswer.of(pool, members=members, **self._live(pool))

    async def health(self, _request: web.Request) -> models.StatusAnswer:
        """Whether the process lives."""
        return models.StatusAnswer(status="ok")

    async def ready(self, _request: web.Request) -> models.StatusAnswer:
        """Whether requests should be sent here."""
        self._check_ready()
        if why := self.leaving():
            raise Unavailable(why, hint="Another replica serves.", retry_after=2)
        return models.StatusAnswer(status="ready")

    def _check_ready(self) -> None:
        trouble = self.trouble()
        if trouble is not None:
            raise Unavailable(trouble, hint="Try again in a moment.", retry_after=2)

    async def _caller(self, request: web.Request) -> Identity:
        return await authenticate(self.authenticators, request.headers.getall("Authorization", []))

    def _live(self, pool: Pool) -> dict[str, Any]:
        return {
            **counts(self.mirror.workers_of(pool.key)),
            "waiting": self.claims.waiting(pool.key),
            "connections": self.connections(pool),
            "gateway_endpoint": self.gateway_endpoint(pool),
        }


def make_app(service: Service) -> web.Application:
    """The application, ready to be run (with `handler_cancellation`, so that a caller who hangs up is noticed)."""
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors])
    routes = service.routes()
    for route in routes:
        app.router.add_route(route.method, route.path, _answering(route.handler))
    described = document(routes)

    async def openapi(_request: web.Request) -> web.StreamResponse:
        return web.json_response(described)

    app.router.add_get("/openapi.json", openapi)
    return app


def _answering(
    handler: Callable[[web.Request], Awaitable[BaseModel]],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def respond(request: web.Request) -> web.Response:
        answer = await handler(request)
        return web.json_response(text=answer.model_dump_json(by_alias=True, exclude_none=True))

    return respond


async def _read(request: web.Request, model: type[B]) -> B:
    """The request's body, checked. Raises InvalidInput."""
    raw = await request.read()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not JSON text"
        raise InvalidInput(f"the body is not JSON: {reason}", hint="Send a JSON object.", field="body") from None
    try:
        return model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise explain(error) from None


def _allowed(caller: Identity, pool: Pool) -> bool:
    try:
        may_use(caller, pool.key)
    except Forbidden:
        return False
    return True


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except BkpoolError as error:
        return _error_answer(error)
    except web.HTTPException as error:
        told = {
            HTTPStatus.NOT_FOUND: (f"there is nothing at {request.path}", "/openapi.json lists what there is."),
            HTTPStatus.METHOD_NOT_ALLOWED: (f"{request.method} is not for {request.path}", "See /openapi.json."),
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (f"body: larger than {MAX_BODY} bytes", "Send less metadata."),
        }.get(HTTPStatus(error.status), (error.reason, ""))
        fault = BkpoolError(told[0], hint=told[1], code=HTTPStatus(error.status).phrase.replace(" ", ""))
        return _error_answer(fault, status=error.status, headers=_kept(error))
    except Exception:
        log.exception("api.crashed", path=request.path)
        return _error_answer(
            BkpoolError("an internal error", hint="`bkpool logs` has the details; please report it.")
        )


def _kept(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


def _error_answer(
    error: BkpoolError, *, status: int | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    detail = models.ErrorDetail(code=error.code, message=error.message, hint=error.hint, field=error.field)
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(
        text=models.ErrorAnswer(error=detail).model_dump_json(by_alias=True, exclude_none=True),
        status=status or error.status,
        headers=headers,
    )
