"""Connects over TLS in two steps, so that whoever waits may give up at any moment.

In uvloop a task that is cancelled between the two steps of `create_connection(ssl=…)` closes the socket and tells TLS
nothing: what TLS does next is a traceback in the log. It never decides how long to wait, or who may answer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import TypeVar

P = TypeVar("P", bound=asyncio.Protocol)


async def connect_tls(
    make: Callable[[], P], host: str, port: int, context: ssl.SSLContext
) -> tuple[asyncio.Transport, P]:
    """Returns a transport on which the handshake is done, and its protocol.

    Raises:
        OSError: Nothing listens there, or the handshake has failed.
    """
    loop = asyncio.get_running_loop()
    raw, _ = await loop.create_connection(asyncio.Protocol, host, port)
    waiting = _Waiting()
    try:
        transport = await loop.start_tls(raw, waiting, context, server_hostname=host)
    except BaseException:
        raw.abort()  # at once: TLS would wait for the other side
        raise
    if transport is None or waiting.is_lost:
        raw.abort()
        raise ConnectionResetError("the connection was lost")
    protocol = make()
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    return transport, protocol


class _Waiting(asyncio.Protocol):
    """Stands in for the protocol until the handshake is done."""

    is_lost = False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the event loop calls it so
        self.is_lost = True
