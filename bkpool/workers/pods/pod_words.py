"""Why a pod has failed, in the words of whoever knows: its status, buildkitd's log, the cluster's events.

It asks, within seconds, and is content with what it gets: a reason that cannot be had never hides the failure.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.kube import Doc, KubeApi, paths
from bkpool.workers.last_words import telling
from bkpool.workers.pods import pod_spec, pod_view

_PATIENCE = 3.0  # seconds for an answer: a lost node's kubelet gives no log at all
_LINES = 40  # of the end of buildkitd's log, in which lines worth showing are looked for
_LONGEST = 300  # characters of an event


class PodWords:
    """Asks one cluster."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api

    async def failure(self, pod: Doc) -> WorkerFailed:
        """Why an ended pod ended."""
        ending = pod_view.ending(pod)
        log_tail = await self.log_tail(pod) if ending.spoke else ""
        return WorkerFailed(ending.message, log_tail=log_tail, hint=ending.hint, field=ending.field)

    async def log_tail(self, pod: Doc) -> str:
        """The last lines of buildkitd's log that are worth showing; empty if there are none."""
        path = paths.core("pods", *paths.key_of(pod), "log")
        lines: list[str] = []
        with suppress(BkpoolError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                lines = telling(await self._api.text(path, tailLines=str(_LINES), container=pod_spec.CONTAINER))
        return "\n".join(lines)

    async def of_the_cluster(self, pod: Doc) -> str:
        """What its last event says, likewise: a pod's own status knows nothing of volumes and networks."""
        namespace, selector = pod["metadata"]["namespace"], f"involvedObject.uid={pod_view.uid(pod)}"
        with suppress(BkpoolError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                events, _ = await self._api.list(paths.core("events", namespace), fieldSelector=selector)
            told = sorted((event.get("lastTimestamp") or "", str(event.get("message", ""))) for event in events)
            return f": {told[-1][1][:_LONGEST]}" if told else ""
        return ""
