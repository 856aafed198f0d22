"""Knows at which address a pod can be reached from here, and asks whether it answers there."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

from bkpool.buildkit import WorkerTls, connect
from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.core.names import WORKER_PORT
from bkpool.kube import Doc
from bkpool.workers import history
from bkpool.workers.pods import pod_view
from bkpool.workers.probe import probe_tls, tcp_endpoint

_ESTABLISHED_TIMEOUT = 3.0  # seconds for a pod that has been running for long


class PodProbe:
    """Probes pods over mutual TLS.

    Args:
        context: Of `pki.worker_tls.worker_context`.
        host: The address of the host ports of pods. None: pods are reached at their own address.
    """

    def __init__(self, context: ssl.SSLContext, host: str | None) -> None:
        self._context = context
        self._host = host

    def endpoint(self, pod: Doc) -> str | None:
        """Where the pod can be reached; None: it has no address yet."""
        address = self._address(pod)
        return None if address is None else tcp_endpoint(*address)

    async def probe(self, pod: Doc) -> None:
        """Makes one call, in the caller's time limit.

        Raises:
            WorkerFailed: Another worker answers there, or this one did not answer with OK.
            Unavailable: Nothing answers there, or the pod has no address yet.
        """
        address = self._address(pod)
        if address is None:
            raise Unavailable("the pod has no address yet")
        await probe_tls(*address, self._context, pod_view.worker_uid(pod))

    async def answers(self, pod: Doc) -> bool:
        """Whether a pod that has been running for some time answers within three seconds."""
        with suppress(TimeoutError, Unavailable, WorkerFailed):
            async with asyncio.timeout(_ESTABLISHED_TIMEOUT):
                await self.probe(pod)
            return True
        return False

    async def clear_history(self, pod: Doc) -> None:
        """Clears the build history of a pod.

        Raises:
            WorkerFailed: Another worker answers there, or this one answered with an error.
            Unavailable: Nothing answers there, or the history was not empty in time.
        """
        endpoint = self.endpoint(pod)
        if endpoint is None:
            raise Unavailable("the pod has no address yet")
        async with connect(endpoint, tls=WorkerTls(self._context, pod_view.worker_uid(pod))) as client:
            await history.clear(client)

    def _address(self, pod: Doc) -> tuple[str, int] | None:
        if self._host is not None:
            port = pod_view.host_port(pod)
            return None if port is None else (self._host, port)
        address = pod_view.address(pod)
        return None if address is None else (address, WORKER_PORT)
