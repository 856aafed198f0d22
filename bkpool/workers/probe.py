"""Asks buildkitd itself whether it is ready, by one call of its Control API: rule 9 (docs/rules.md#r9).

A worker is never judged by its process or its socket file. Time limits are the caller's.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from bkpool.buildkit import WorkerTls, connect


async def probe(path: Path) -> int:
    """Makes one call over a Unix socket.

    Returns:
        The id of the process that answered, as this process sees it. It comes from the kernel (SO_PEERCRED).

    Raises:
        WorkerFailed: What listens there did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection.
    """
    async with connect(f"unix://{path}") as client:
        await client.ready()
        return client.peer_pid


async def probe_tls(host: str, port: int, context: ssl.SSLContext, worker_uid: str) -> None:
    """Makes one call to a worker's port over mutual TLS.

    Args:
        host: An IP address.
        port: Where buildkitd, or a proxy before it, listens.
        context: Of `pki.worker_tls.worker_context`.
        worker_uid: The uid of the worker that should answer.

    Raises:
        WorkerFailed: Another worker listens there, or it did not answer the call with OK.
        Unavailable: Nothing listens there, or it closed the connection, or it does not speak our TLS.
    """
    async with connect(tcp_endpoint(host, port), tls=WorkerTls(context, worker_uid)) as client:
        await client.ready()


def tcp_endpoint(host: str, port: int) -> str:
    """The endpoint of a worker that listens on an IP address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
