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
from bkpool.buildkit.tls_client import TlsClient, TlsSessions
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
    endpoint = f"unix://{path}"
    async with _asking(endpoint, lambda: _Asking(endpoint), lambda make: _connect_socket(path, make)) as asking:
        await asking.answer()
        sock: socket.socket = asking.transport.get_extra_info("socket")
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        return int(_PEERCRED.unpack(credentials)[0])


async def ask_over_tls(
    endpoint: str, host: str, port: int, tls: WorkerTls, sessions: TlsSessions | None = None
) -> None:
    """Makes the call over mutual TLS, once the certificate has shown that it is the right worker.

    Args:
        endpoint: The endpoint, for messages.
        host: An IP address.
        port: Where buildkitd, or a proxy before it, listens.
        tls: How to reach the worker, and how to recognise it.
        sessions: Has the sessions of workers that were recognised before. None: every handshake is a whole one.

    Raises:
        WorkerFailed: Another worker listens there, or it did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection, or it does not speak our TLS, or it took too
            long. The cause is the error of the system.
    """
    known = TlsSessions() if sessions is None else sessions
    loop = asyncio.get_running_loop()
    try:
        async with _asking(
            endpoint,
            lambda: _AskingOverTls(endpoint, tls, known),
            lambda make: loop.create_connection(make, host, port),
        ) as asking:
            await asking.answer()
    except BaseException:
        known.drop(tls.worker_uid)
        raise


class _Asking(asyncio.Protocol):
    """The connection on which a worker is asked."""

    transport: asyncio.Transport

    def __init__(self, endpoint: str) -> None:
        self._call = ReadyCall(endpoint)
        self._endpoint = endpoint
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._early: bytes | None = b""
        """What the worker has sent before it was asked: nothing may be acknowledged before that. None: it was."""
        self.closed = asyncio.Event()

    async def answer(self) -> None:
        """Sends the request, and returns when it is answered with OK."""
        self._ask()
        await self._over

    def _ask(self) -> None:
        early, self._early = self._early, None
        self._send(REQUEST)
        if early:
            self._take(early)

    def _send(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._take(data)

    def _take(self, data: bytes) -> None:
        """Takes what the worker says."""
        if self._early is not None:
            self._early += data
        if self._early is not None or self._over.done():
            return
        try:
            back = self._call.receive(data)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._fail(error)
            return
        if back:
            self._send(back)
        if self._call.answered:
            self._over.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.closed.set()
        reason = describe(exc) if isinstance(exc, OSError) else "the connection was lost"
        self._fail(Unavailable(f"{self._endpoint} broke off the call {NAME}: {reason}"))

    async def close(self) -> None:
        """Ends the connection at once, without TLS's closing handshake: a peer that hangs would delay it by 30 s."""
        self._over.cancel()
        if self._over.done() and not self._over.cancelled():
            self._over.exception()  # nobody waits for it any more
        self.transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self.closed.wait()


class _AskingOverTls(_Asking):
    """The same over TLS. The worker is asked as soon as it is known who it is."""

    def __init__(self, endpoint: str, tls: WorkerTls, sessions: TlsSessions) -> None:
        super().__init__(endpoint)
        self._worker = tls
        self._sessions = sessions
        now = asyncio.get_running_loop().time()
        self._tls = TlsClient(tls.context, sessions.get(tls.worker_uid, tls.context, now))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(self._tls.begin())

    async def answer(self) -> None:
        """Returns when the worker has answered with OK, and its session can be used again."""
        await self._over
        if not self._tls.is_resumed:
            now = asyncio.get_running_loop().time()
            self._sessions.put(self._worker.worker_uid, self._worker.context, self._tls.session, now)

    def data_received(self, data: bytes) -> None:
        begins = not self._tls.is_ready
        try:
            plaintext = self._tls.receive(data)
            if begins and self._tls.is_ready:
                self._recognise()
                self._ask()
        except ssl.SSLError as error:
            self._fail(_unreachable(self._endpoint, error))
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._fail(error)
        else:
            if plaintext:
                self._take(plaintext)
        if last := self._tls.to_send():
            self.transport.write(last)

    def _recognise(self) -> None:
        """Raises WorkerFailed if it is another worker. A session is kept only for the right one."""
        if not self._tls.is_resumed:
            check_worker(self._tls.peer_certificate, self._worker.worker_uid)

    def _send(self, data: bytes) -> None:
        self.transport.write(self._tls.send(data))


_Make = Callable[[], _Asking]
_Connect = Callable[[_Make], Awaitable[tuple[asyncio.BaseTransport, _Asking]]]


def _connect_socket(path: Path, make: _Make) -> Awaitable[tuple[asyncio.BaseTransport, _Asking]]:
    return asyncio.get_running_loop().create_unix_connection(make, str(path))


def _unreachable(endpoint: str, error: OSError) -> Unavailable:
    unreachable = Unavailable(f"{endpoint} cannot be reached: {describe(error)}")
    unreachable.__cause__ = error
    return unreachable


@asynccontextmanager
async def _asking(endpoint: str, make: _Make, connect: _Connect) -> AsyncIterator[_Asking]:
    try:
        async with asyncio.timeout(_LONGEST):
            try:
                _, asking = await connect(make)
            except OSError as error:
                raise _unreachable(endpoint, error) from error
            try:
                yield asking
            finally:
                await asking.close()
    except TimeoutError:
        raise Unavailable(f"{endpoint} did not answer {NAME} within {_LONGEST:g} s") from None
