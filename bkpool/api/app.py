"""The application: its routes, what happens around each request, and the one place where errors become responses.

Each request has an id, which its log lines and its response contain, and an audit trail. bkpool has no write time-out
that would end a waiting allocate request. A caller who closes the connection cancels their request.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from aiohttp import web

from bkpool.api.answering import SENT, json_answer
from bkpool.api.audit import audited
from bkpool.api.bodies import BODY_TIMEOUT
from bkpool.api.error_responses import error_response, internal_error
from bkpool.api.metrics import ApiMetrics
from bkpool.api.openapi import ApiRoute, document
from bkpool.api.service import Service
from bkpool.core.errors import BkpoolError

log = structlog.get_logger(__name__)

_MAX_BODY = web.AppKey("max_body", int)
_REQUEST_ID = web.RequestKey("request_id", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(service: Service, metrics: ApiMetrics) -> web.Application:
    """The application; serve it with `open_runner`.

    Args:
        service: The handlers of the routes, and the limits.
        metrics: Counts the requests.
    """
    middlewares = [metrics.middleware(), _request_id, _errors]
    app = web.Application(client_max_size=service.limits.max_body, middlewares=middlewares)
    app.on_response_prepare.append(_add_request_id)
    app[_MAX_BODY] = service.limits.max_body
    app[BODY_TIMEOUT] = service.limits.body_timeout
    routes = service.routes()
    for route in routes:
        app.router.add_route(route.method, route.path, _handler(route), expect_handler=_continue)
        metrics.expect(route.path, route.method, ("200", "500", *(str(error.value) for error in route.all_errors)))
    description = document(routes)

    async def openapi(_request: web.Request) -> web.StreamResponse:
        return web.json_response(description)

    app.router.add_get("/openapi.json", openapi)
    return app


def _handler(route: ApiRoute) -> Handler:
    async def respond(request: web.Request) -> web.StreamResponse:
        with audited(route.action, request.remote or "local socket") as trail:
            answer = await route.handler(request, trail)
        return answer if isinstance(answer, web.StreamResponse) else json_answer(answer)

    return respond


async def _continue(request: web.Request) -> None:
    """Lets a caller send the body that they announced (curl announces a large one). Ignores other expectations."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


@web.middleware
async def _request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request an id, for its log lines and its caller."""
    request[_REQUEST_ID] = request_id = secrets.token_hex(6)
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        return await handler(request)


async def _add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Adds the id to every response, just before it is sent."""
    if request_id := request.get(_REQUEST_ID):
        response.headers["X-Request-Id"] = request_id


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every error into a response."""
    try:
        return await handler(request)
    except BkpoolError as error:
        return error_response(error)
    except web.HTTPException as error:
        return _aiohttp_error(request, error)
    except Exception:
        log.exception("api.crashed", path=request.path)
        return request.get(SENT) or error_response(internal_error())


def _aiohttp_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """The response for an error of aiohttp: a path or method without a route, or a body that is too large."""
    message, hint = {
        HTTPStatus.NOT_FOUND: (f"there is nothing at {request.path}", "/openapi.json lists all paths."),
        HTTPStatus.METHOD_NOT_ALLOWED: (
            f"{request.path} does not support the method {request.method}",
            "/openapi.json lists the methods of each path.",
        ),
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (
            f"the request body is larger than {request.app[_MAX_BODY]} bytes",
            "Send less metadata.",
        ),
    }.get(HTTPStatus(error.status), (error.reason, ""))
    fault = BkpoolError(message, hint=hint, code=HTTPStatus(error.status).phrase.replace(" ", ""))
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return error_response(fault, status=error.status, headers=headers)
