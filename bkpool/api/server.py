"""Serves HTTP with aiohttp, and answers requests that are not valid HTTP.

aiohttp itself would log such a request and send it back, including a credential in it. Only the user of this process
and root are served on a Unix socket.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import Any

import structlog
from aiohttp import web

from bkpool.api.error_responses import error_response, internal_error
from bkpool.core.errors import BkpoolError, InvalidInput
from bkpool.home import local_socket
from bkpool.identity.access import LONGEST_BEARER

log = structlog.get_logger(__name__)

MAX_FIELD = LONGEST_BEARER + 1024
"""Bytes of one header: the longest bearer token, and the rest of its line."""

_SETTINGS: dict[str, Any] = {
    "access_log": None,
    "max_field_size": MAX_FIELD,
    "auto_decompress": False,  # a body is used as it was sent, so a small one cannot unpack into a large one
}


class _Protocol(web.RequestHandler):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hangs up on a foreign user of the Unix socket. Its mode and its directory keep them out, too."""
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected.family == socket.AF_UNIX:
            uid = local_socket.peer_uid(connected)
            if not local_socket.may_connect(uid):
                log.warning("api.local_peer_refused", uid=uid)
                self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - contains parts of the request
    ) -> web.StreamResponse:
        """Answers a request that reached no route. Neither the log nor the response contains any part of it."""
        if isinstance(exc, UnicodeError):  # aiohttp would have sent bytes of the request back that are not text
            status = web.HTTPBadRequest.status_code
        log.info("api.request_malformed", remote=request.remote, status=status, reason=type(exc).__name__)
        if status < web.HTTPInternalServerError.status_code:
            error: BkpoolError = InvalidInput(
                "the request is not valid HTTP", hint=f"A header may have at most {MAX_FIELD} bytes."
            )
        else:
            error = internal_error()
        response = error_response(error, status=status)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=asyncio.get_running_loop(), **_SETTINGS)


async def open_runner(stack: AsyncExitStack, app: web.Application, *, shutdown_timeout: float) -> web.BaseRunner:
    """A runner for this application, without addresses yet. A caller who closes the connection cancels their request.

    Args:
        stack: Closes it.
        app: What is served.
        shutdown_timeout: Seconds that running requests get when it closes.
    """
    routes = web.AppRunner(app)
    await routes.setup()
    stack.push_async_callback(routes.cleanup)
    if routes.server is None:
        raise RuntimeError("aiohttp set up an application without a server")
    server = _Server(
        routes.server.request_handler, request_factory=routes.server.request_factory, handler_cancellation=True
    )
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_timeout)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner
