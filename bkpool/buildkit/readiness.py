"""Asks a worker whether it is ready, on a connection of its own: the most frequent question of all.

What is sent and how the answer is judged is in `ready_call`. It asks once, and never decides who is asked or when.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import cast

from bkpool.buildkit.connection import WorkerTls, describe
from bkpool.buildkit.ready_call import NAME, REQUEST, ReadyCall
from bkpool.buildkit.tls_connection import connect_tls
from bkpool.core.errors import Unavailable
from bkpool.pki.worker_tls import check_worker

_LONGEST = 30.0
"""Seconds for all of it, if the caller has no shorter limit."""
_CLOSE_TIMEOUT = 1.0  # seconds for the event loop to report the end of a connection that was aborted
_PEERCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


async def ask_on_socket(path: Path) -> int:
    """Makes the call over a Unix socket.

    Returns:
        The id of the process that answered, as this process sees it (SO_PEERCRED of unix(7)).

    Raises:
        WorkerFailed: What listens there did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection, or it took too long. The cause is the error
            of the system.
    """
    loop = asyncio.get_running_loop()
    async with _asking(f"unix://{path}", lambda make: loop.create_unix_connection(make, str(path))) as asking:
        await asking.answer()
        sock: socket.socket = asking.transport.get_extra_info("socket")
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        return int(_PEERCRED.unpack(credentials)[0])


async def ask_over_tls(endpoint: str, host: str, port: int, tls: WorkerTls) -> None:
    """Makes the call over mutual TLS, once the certificate has shown that it is the right worker.

    Args:
        endpoint: The endpoint, for messages.
        host: An IP address.
        port: Where buildkitd, or a proxy before it, listens.
        tls: How to reach the worker, and how to recognise it.

    Raises:
        WorkerFailed: Another worker listens there, or it did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection, or it does not speak our TLS, or it took too
            long. The cause is the error of the system.
    """
    async with _asking(endpoint, lambda make: connect_tls(make, host, port, tls.context)) as asking:
        session: ssl.SSLObject = asking.transport.get_extra_info("ssl_object")
        check_worker(session.getpeercert(binary_form=True), tls.worker_uid)
        await asking.answer()


class _Asking(asyncio.Protocol):
    """The connection on which a worker is asked."""

    transport: asyncio.Transport

    def __init__(self, endpoint: str) -> None:
        self._call = ReadyCall(endpoint)
        self._endpoint = endpoint
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._early: bytes | None = b""
        """What the worker has said before it was asked: nothing may be acknowledged before that. None: it was."""
        self.closed = asyncio.Event()

    async def answer(self) -> None:
        """Sends the request, and returns when it is answered with OK."""
        early, self._early = self._early, None
        self.transport.write(REQUEST)
        if early:
            self.data_received(early)
        await self._over

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._early is not None:
            self._early += data
        if self._early is not None or self._over.done():
            return
        try:
            back = self._call.receive(data)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._over.set_exception(error)
            return
        if back:
            self.transport.write(back)
        if self._call.answered:
            self._over.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.closed.set()
        if not self._over.done():
            reason = describe(exc) if isinstance(exc, OSError) else "the connection was lost"
            self._over.set_exception(Unavailable(f"{self._endpoint} broke off the call {NAME}: {reason}"))

    async def close(self) -> None:
        """Ends the connection at once, without TLS's closing handshake: a peer that hangs would delay it by 30 s."""
        self._over.cancel()
        if self._over.done() and not self._over.cancelled():
            self._over.exception()  # nobody waits for it any more
        self.transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self.closed.wait()


_Connect = Callable[[Callable[[], _Asking]], Awaitable[tuple[asyncio.BaseTransport, _Asking]]]


@asynccontextmanager
async def _asking(endpoint: str, connect: _Connect) -> AsyncIterator[_Asking]:
    try:
        async with asyncio.timeout(_LONGEST):
            try:
                _, asking = await connect(lambda: _Asking(endpoint))
            except OSError as error:
                raise Unavailable(f"{endpoint} cannot be reached: {describe(error)}") from error
            try:
                yield asking
            finally:
                await asking.close()
    except TimeoutError:
        raise Unavailable(f"{endpoint} did not answer {NAME} within {_LONGEST:g} s") from None
