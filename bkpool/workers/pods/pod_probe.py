"""Knows at which address a pod can be reached from here, and asks whether it answers there."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

from bkpool.buildkit import TlsSessions, WorkerTls, connect
from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.core.names import WORKER_PORT
from bkpool.kube import Doc
from bkpool.pki.pool_authority import WorkerContexts
from bkpool.workers import history
from bkpool.workers.pods import pod_view
from bkpool.workers.probe import probe_tls, tcp_endpoint

_ESTABLISHED_TIMEOUT = 3.0  # seconds for a pod that has been running for long


class PodProbe:
    """Probes pods over mutual TLS.

    Args:
        contexts: The TLS settings.
        host: The address of the host ports of pods. None: pods are reached at their own address.
    """

    def __init__(self, contexts: WorkerContexts, host: str | None) -> None:
        self._contexts = contexts
        self._host = host
        self._sessions = TlsSessions()

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
        uid, sessions = pod_view.worker_uid(pod), self._sessions
        await self._with_context(pod, lambda context: probe_tls(*address, context, uid, sessions))

    async def answers(self, pod: Doc) -> bool:
        """Whether a pod that has been running for some time answers within three seconds."""
        with suppress(TimeoutError, Unavailable, WorkerFailed, HostFault):
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

        async def clear(context: ssl.SSLContext) -> None:
            async with connect(endpoint, tls=WorkerTls(context, pod_view.worker_uid(pod))) as client:
                await history.clear(client)

        await self._with_context(pod, clear)

    async def _with_context(self, pod: Doc, work: Callable[[ssl.SSLContext], Awaitable[None]]) -> None:
        """Does something with the TLS settings that fit the pod's certificate. Raises what `work` raises at last."""
        contexts = self._contexts.of_worker(pod_view.pool_of(pod), pod_view.authority(pod))
        if not contexts:
            raise WorkerFailed("its certificate is from a certificate authority that is not known any more")
        for context in contexts[:-1]:  # several only for pods from before each pool had a CA of its own
            with suppress(Unavailable, WorkerFailed):
                await work(context)
                return
        await work(contexts[-1])

    def _address(self, pod: Doc) -> tuple[str, int] | None:
        if self._host is not None:
            port = pod_view.host_port(pod)
            return None if port is None else (self._host, port)
        address = pod_view.address(pod)
        return None if address is None else (address, WORKER_PORT)
