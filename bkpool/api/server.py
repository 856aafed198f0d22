"""Serves HTTP with aiohttp, and answers requests that are not valid HTTP.

aiohttp itself would log such a request and send it back, including a credential in it. And it has no limit of
connections, nor of the time until a request comes. Only the user of this process and root are served on a Unix
socket.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, cast

import structlog
from aiohttp import HttpVersion11, web

from bkpool.api.caller_socket import SocketReceipt, is_broken
from bkpool.api.error_responses import error_response, internal_error
from bkpool.api.limits import HttpLimits
from bkpool.api.tcp_site import AcceptedConnection, BoundedTcpSite
from bkpool.core.errors import BkpoolError, InvalidInput
from bkpool.home import local_socket
from bkpool.identity.access import LONGEST_BEARER

log = structlog.get_logger(__name__)

MAX_FIELD = LONGEST_BEARER + 1024
"""Bytes of one header: the longest bearer token, and the rest of its line."""

_STILL_AT_IT = b"HTTP/1.1 102 Processing\r\n\r\n"
"""Every client skips it (RFC 9110, 15.2). It makes the system of a caller who has closed the connection say so."""
_FIRST_LOOK, _LONGEST_LOOK = 0.001, 1.0  # seconds

_SETTINGS: dict[str, Any] = {
    "access_log": None,
    "max_field_size": MAX_FIELD,
    "auto_decompress": False,  # a body is used as it was sent, so a small one cannot unpack into a large one
}


class _Protocol(web.RequestHandler):
    """Reads the requests of one connection, and says when it has one."""

    __slots__ = ("_answered", "_connection", "_header_timer", "_limits", "_receipt", "_request", "_stream_ended")

    def __init__(self, server: web.Server, limits: HttpLimits, connection: AcceptedConnection | None) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, keepalive_timeout=limits.idle_timeout, **_SETTINGS)
        self._limits = limits
        self._connection = connection
        self._header_timer: asyncio.TimerHandle | None = None
        self._receipt: SocketReceipt | None = None
        """Of the last answer that `receipt` was called for."""
        self._request: web.BaseRequest | None = None
        """The request whose handler runs and whose answer has not begun."""
        self._stream_ended = False
        """The caller has ended their stream while they waited for an answer."""
        self._answered = False
        """The last request is answered, and nothing has come since."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to wait for the header of the first request.

        Hangs up on a foreign user of the Unix socket. Its mode and its directory keep them out, too.
        """
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected.family == socket.AF_UNIX:
            uid = local_socket.peer_uid(connected)
            if not local_socket.may_connect(uid):
                log.warning("api.local_peer_refused", uid=uid)
                self.force_close()
                return
        loop = asyncio.get_running_loop()
        if self._connection is not None:
            self._connection.transport = cast("asyncio.Transport", transport)
        deadline = self._connection.deadline if self._connection else loop.time() + self._limits.header_timeout
        self._header_timer = loop.call_at(deadline, self._cut)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Gives the connection's place back."""
        self._header_received()
        if self._connection is not None:
            self._connection.closed()
        if self._receipt is not None:
            self._receipt.connection_ended(exc)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads what has come."""
        self._answered = False
        super().data_received(data)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # what asyncio.Protocol allows
        """The caller has ended their stream. Returns whether they may still read the answer that they wait for.

        A caller who has closed the connection looks the same over TCP. They are found by sending something to them.
        """
        if self._receipt is not None:
            self._receipt.stream_ended()
        is_idle = self._waiter is not None and not self._waiter.done()
        if is_idle or self.transport is None or self.transport.get_extra_info("sslcontext"):
            return None  # asyncio always closes both directions of TLS
        self._stream_ended = True
        if self._answered and not self._messages and self._current_request is None:
            self.close()  # once the answer is written; without this it would stay for the whole idle timeout
            return True
        return self._request is None or self._may_read_on(self._request)  # None: its handler begins in a moment

    def _may_read_on(self, request: web.BaseRequest) -> bool:
        """Whether a caller who has ended their stream may be there. If so, they are looked at until the answer."""
        if self.transport is None or not request.content.is_eof():
            return False
        sock = self.transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            there = not is_broken(sock)
        else:
            there = request.version >= HttpVersion11  # to others nothing may be sent before the answer
            if there:
                self.transport.write(_STILL_AT_IT)
        if there:
            self._look_after(_FIRST_LOOK, request)
        return there

    def _look_after(self, seconds: float, request: web.BaseRequest) -> None:
        asyncio.get_running_loop().call_later(seconds, self._look, seconds, request)

    def _look(self, waited: float, request: web.BaseRequest) -> None:
        """Cuts a caller who has hung up. Looks again later, ever more rarely, while they are there."""
        if self.transport is None or self._request is not request:
            return
        if is_broken(self.transport.get_extra_info("socket")):
            self.transport.abort()
        else:
            self._look_after(min(2 * waited, _LONGEST_LOOK), request)

    def answer_begins(self) -> bool:
        """See AnswersEarly."""
        self._request = None
        return self.transport is not None and not is_broken(self.transport.get_extra_info("socket"))

    def receipt(self) -> SocketReceipt:
        """See AnswersEarly. Raises ConnectionError if the connection is over."""
        if self.transport is None:
            raise ConnectionResetError("the connection is over")
        self._receipt = SocketReceipt(self.transport)
        return self._receipt

    async def answer(self, request: web.BaseRequest, handler: _Handler) -> web.StreamResponse:
        """Answers a request whose header has come. Once its body is here, the connection is not closed for others."""
        self._header_received()
        self._request = request
        if self._receipt is not None:
            self._receipt.stream_ended()
        if self._stream_ended and not self._may_read_on(request) and self.transport is not None:
            self.transport.close()
        answering = True

        def whole() -> None:
            if answering and self._connection is not None:
                self._connection.asks()

        request.content.on_eof(whole)
        try:
            return await handler(request)
        finally:
            answering = False
            self._request = None
            self._answered = True
            if self._connection is not None:
                self._connection.asks_nothing()
            if self._stream_ended and not self._messages:
                self.close()  # no further request can come

    def _header_received(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cut(self) -> None:
        self._header_timer = None
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - contains parts of the request
    ) -> web.StreamResponse:
        """Answers a request that reached no route. Neither the log nor the response contains any part of it."""
        self._header_received()
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


_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _Server(web.Server):
    """Makes the protocols of connections, those of a TCP site and those of a Unix socket."""

    def __init__(self, routes: web.Server, limits: HttpLimits) -> None:
        super().__init__(self._answer, request_factory=routes.request_factory, handler_cancellation=True)
        self._routes = routes.request_handler
        self.limits = limits

    def __call__(self) -> web.RequestHandler:
        """The protocol of a connection to a Unix socket."""
        return _Protocol(self, self.limits, None)

    def protocol(self, connection: AcceptedConnection) -> web.RequestHandler:
        """The protocol of a connection that a TCP site has accepted."""
        return _Protocol(self, self.limits, connection)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = request.protocol
        assert isinstance(protocol, _Protocol)  # noqa: S101 - this server makes no others
        return await protocol.answer(request, self._routes)


async def open_runner(
    stack: AsyncExitStack,
    app: web.Application,
    *,
    shutdown_timeout: float,
    limits: HttpLimits = HttpLimits(),  # noqa: B008 - immutable
) -> web.BaseRunner:
    """A runner for this application, without addresses yet. A caller who closes the connection cancels their request.

    Args:
        stack: Closes it.
        app: What is served.
        shutdown_timeout: Seconds that running requests get when it closes.
        limits: Of its connections. Those in number are for TCP (`listen`), those in time also for a Unix socket.
    """
    routes = web.AppRunner(app)
    await routes.setup()
    stack.push_async_callback(routes.cleanup)
    if routes.server is None:
        raise RuntimeError("aiohttp set up an application without a server")
    runner = web.ServerRunner(_Server(routes.server, limits), shutdown_timeout=shutdown_timeout)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner


async def listen(
    runner: web.BaseRunner, host: str, port: int, ssl_context: ssl.SSLContext | None = None
) -> tuple[str, int]:
    """Serves on a TCP address, and returns it with the real port.

    Args:
        runner: Made by `open_runner`.
        host: A name or an address.
        port: 0 takes a free port.
        ssl_context: Serves over TLS if given.

    Raises:
        OSError: The address cannot be used.
    """
    server = runner.server
    assert isinstance(server, _Server)  # noqa: S101 - open_runner makes no other
    site = BoundedTcpSite(runner, host, port, server=server, limits=server.limits, ssl_context=ssl_context)
    await site.start()
    bound = runner.addresses[-1]
    return bound[0], bound[1]
