"""Asks buildkitd itself whether it is ready, by one call of its Control API: rule 9 (docs/rules.md#r9).

A worker is never judged by its process or its socket file. Time limits are the caller's.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bkpool.buildkit import TlsSessions, WorkerTls, ask_on_socket, ask_over_tls
from bkpool.core.errors import Unavailable
from bkpool.toolchain.descriptor_limit import is_lack_of_descriptors, too_many_open_files


async def probe(path: Path) -> int:
    """Makes one call over a Unix socket.

    Returns:
        The id of the process that answered, as this process sees it. It comes from the kernel (SO_PEERCRED).

    Raises:
        WorkerFailed: What listens there did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection.
        HostFault: `TooManyOpenFiles`: this process could not ask. The worker may be ready.
    """
    with _own_lack_named(str(path)):
        return await ask_on_socket(path)


async def probe_tls(
    host: str, port: int, context: ssl.SSLContext, worker_uid: str, sessions: TlsSessions | None = None
) -> None:
    """Makes one call to a worker's port over mutual TLS.

    Args:
        host: An IP address.
        port: Where buildkitd, or a proxy before it, listens.
        context: Of `pki.worker_tls.worker_context`.
        worker_uid: The uid of the worker that should answer.
        sessions: Those of earlier calls, which make this one cheaper.

    Raises:
        WorkerFailed: Another worker listens there, or it did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection, or it does not speak our TLS.
        HostFault: `TooManyOpenFiles`: this process could not ask. The worker may be ready.
    """
    endpoint = tcp_endpoint(host, port)
    with _own_lack_named(endpoint):
        await ask_over_tls(endpoint, host, port, WorkerTls(context, worker_uid), sessions)


@contextmanager
def _own_lack_named(endpoint: str) -> Iterator[None]:
    """Keeps apart what is no fault of the worker: that this process has no file descriptor left to ask it."""
    try:
        yield
    except Unavailable as error:
        if isinstance(error.__cause__, OSError) and is_lack_of_descriptors(error.__cause__):
            raise too_many_open_files(f"{endpoint} cannot be asked") from None
        raise


def tcp_endpoint(host: str, port: int) -> str:
    """The endpoint of a worker that listens on an IP address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
