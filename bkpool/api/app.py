"""The application: its routes with what surrounds each request, and the one place where errors become answers.

Each request has an id, which its log lines and its answer carry, and a trail for the audit. No write time-out of ours
ends an allocate that waits; a caller who hangs up cancels it.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from aiohttp import web

from bkpool.api.answers import error_answer, internal_error
from bkpool.api.audit import audited
from bkpool.api.openapi import ApiRoute, document
from bkpool.api.service import Service
from bkpool.core.errors import BkpoolError

log = structlog.get_logger(__name__)

MAX_BODY = 64 * 1024
"""Bytes of a request body: many times what a CSR and 64 pieces of metadata take."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(service: Service) -> web.Application:
    """The application, ready to be given to `open_runner`."""
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_named, _errors])
    routes = service.routes()
    for route in routes:
        app.router.add_route(route.method, route.path, _answering(route), expect_handler=_go_on)
    described = document(routes)

    async def openapi(_request: web.Request) -> web.StreamResponse:
        return web.json_response(described)

    app.router.add_get("/openapi.json", openapi)
    return app


def _answering(route: ApiRoute) -> Handler:
    async def respond(request: web.Request) -> web.StreamResponse:
        with audited(route.action, request.remote) as trail:
            answer = await route.handler(request, trail)
        return web.json_response(text=answer.model_dump_json(by_alias=True, exclude_none=True))

    return respond


async def _go_on(request: web.Request) -> None:
    """Lets a caller send the body which he announces (curl does so with a large one); knows no other expectation."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


@web.middleware
async def _named(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request an id, for its log lines and its caller."""
    request_id = secrets.token_hex(6)
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        response = await handler(request)
    response.headers["X-Request-Id"] = request_id
    return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except BkpoolError as error:
        return error_answer(error)
    except web.HTTPException as error:
        told = {
            HTTPStatus.NOT_FOUND: (f"there is nothing at {request.path}", "/openapi.json lists what there is."),
            HTTPStatus.METHOD_NOT_ALLOWED: (f"{request.method} is not for {request.path}", "See /openapi.json."),
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (f"body: larger than {MAX_BODY} bytes", "Send less metadata."),
        }.get(HTTPStatus(error.status), (error.reason, ""))
        fault = BkpoolError(told[0], hint=told[1], code=HTTPStatus(error.status).phrase.replace(" ", ""))
        return error_answer(fault, status=error.status, headers=_kept(error))
    except Exception:
        log.exception("api.crashed", path=request.path)
        return error_answer(internal_error())


def _kept(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
