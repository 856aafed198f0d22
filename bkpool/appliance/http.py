"""Serves applications on addresses, and provides the two that every process has: metrics and probes.

It knows no route of the API.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from bkpool.api import HttpLimits, listen, open_runner
from bkpool.appliance.local_site import LocalSite
from bkpool.appliance.run_options import Address
from bkpool.appliance.supervise import background_task
from bkpool.core.errors import HostFault
from bkpool.home.local_socket import SocketPlaces

FEW_CLIENTS = HttpLimits(connections=64, connections_per_address=64)
"""For metrics, probes and the development issuer."""


async def serve(
    stack: AsyncExitStack,
    app: web.Application,
    address: Address,
    where: str,
    ssl_context: ssl.SSLContext | None = None,
    *,
    local: SocketPlaces | None = None,
    limits: HttpLimits = FEW_CLIENTS,
) -> str:
    """Serves an application until the stack is closed. A caller who closes the connection cancels their request.

    Args:
        stack: Closes the server.
        app: What is served.
        address: Where; port 0 takes a free port.
        where: What gave the address, for error messages: an option, a variable or a place in a file.
        ssl_context: Serves over TLS if given.
        local: Also serves on this Unix socket, without TLS. Nobody else can make or use files in its directories.
        limits: Of its connections.

    Returns:
        The address that is served, as host:port for a URL.

    Raises:
        HostFault: `PortTaken`, or the address or the socket cannot be used.
    """
    runner = await open_runner(stack, app, shutdown_timeout=2, limits=limits)
    host, port = address
    try:
        bound = await listen(runner, host, port, ssl_context)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HostFault(
                f"{where}: port {port} on {host} is in use",
                hint=f"Stop the program that `ss -ltnp 'sport = :{port}'` shows, or choose another port.",
                code="PortTaken",
            ) from None
        forbidden = error.errno in {errno.EACCES, errno.EPERM}
        raise HostFault(
            f"{where}: cannot listen on {Address(host, port)}: {_reason(error)}",
            hint="Choose a port above 1023." if forbidden else "Choose an address of this machine.",
        ) from None
    if local is not None:
        site = LocalSite(runner, local)
        await site.start()
        await stack.enter_async_context(background_task(site.keep(), lambda _error: None))
    return f"{url_host(bound[0])}:{bound[1]}"


def _reason(error: OSError) -> str:
    """What the system says. asyncio puts a sentence about bind before it, with the address again."""
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    # Since Python 3.13 asyncio passes over addresses of other machines, and its error for all of them has no number.
    return os.strerror(error.errno or errno.EADDRNOTAVAIL)


def url_host(host: str) -> str:
    """A host as it is written in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def metrics_app(registry: CollectorRegistry) -> web.Application:
    """An application that Prometheus scrapes at /metrics."""

    async def scrape(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    return app


def add_probes(app: web.Application, not_ready_reason: Callable[[], Awaitable[str | None]]) -> web.Application:
    """Adds /health and /ready, which the kubelet calls.

    Args:
        app: Where they are added.
        not_ready_reason: Returns why this replica should get no traffic; None if it should.
    """

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_request: web.Request) -> web.Response:
        reason = await not_ready_reason()
        return web.json_response({"status": reason or "ready"}, status=503 if reason else 200)

    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    return app
