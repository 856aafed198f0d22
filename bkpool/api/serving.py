"""How requests come in: aiohttp's server, with answers of our own to what is not HTTP.

aiohttp itself would log such a request and send it back, with whatever credential is in it.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import structlog
from aiohttp import web

from bkpool.api.answers import error_answer, internal_error
from bkpool.core.errors import BkpoolError, InvalidInput
from bkpool.identity.access import LONGEST_BEARER

log = structlog.get_logger(__name__)

MAX_FIELD = LONGEST_BEARER + 1024
"""Bytes of one header: the longest bearer token, and what is around it."""

_SETTINGS: dict[str, Any] = {
    "access_log": None,
    "max_field_size": MAX_FIELD,
    "auto_decompress": False,  # a body is as it came: nothing small unpacks into something large
}


class _Protocol(web.RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - has parts of the request in it
    ) -> web.StreamResponse:
        """Answers what no route has seen. Neither the log nor the answer has anything of the request."""
        if isinstance(exc, UnicodeError):  # of an answer that would repeat bytes of the request which are no text
            status = web.HTTPBadRequest.status_code
        log.info("api.unreadable", remote=request.remote, status=status, reason=type(exc).__name__)
        if status < web.HTTPInternalServerError.status_code:
            error: BkpoolError = InvalidInput(
                "this is not an HTTP request that can be read", hint=f"A header has at most {MAX_FIELD} bytes."
            )
        else:
            error = internal_error()
        response = error_answer(error, status=status)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=asyncio.get_running_loop(), **_SETTINGS)


async def open_runner(stack: AsyncExitStack, app: web.Application, *, shutdown_timeout: float) -> web.BaseRunner:
    """A runner of this application, to give addresses to. A caller who hangs up cancels his request.

    Args:
        stack: Ends it.
        app: What answers.
        shutdown_timeout: Seconds that a request under way gets when it ends.
    """
    routes = web.AppRunner(app)
    await routes.setup()
    stack.push_async_callback(routes.cleanup)
    if routes.server is None:
        raise RuntimeError("aiohttp has set up an application without a server")
    server = _Server(
        routes.server.request_handler, request_factory=routes.server.request_factory, handler_cancellation=True
    )
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_timeout)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner
