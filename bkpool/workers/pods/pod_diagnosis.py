"""Finds out why a pod has failed: from its status, from buildkitd's log, and from the cluster's events.

Every question has a short time limit. A missing answer never hides the failure itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.kube import Doc, KubeApi, paths
from bkpool.workers.log_tail import informative_lines
from bkpool.workers.pods import pod_spec, pod_view

_TIMEOUT = 3.0  # seconds for an answer: the kubelet of a lost node returns no log at all
_LINES = 40  # of the end of buildkitd's log, in which informative lines are looked for
_LONGEST = 300  # characters of an event


class PodDiagnosis:
    """Asks one cluster about failed pods."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api

    async def failure(self, pod: Doc) -> WorkerFailed:
        """Why an ended pod has ended, as an error to raise or to show."""
        ending = pod_view.ending(pod)
        log_tail = await self.log_tail(pod) if ending.has_log else ""
        return WorkerFailed(ending.message, log_tail=log_tail, hint=ending.hint, field=ending.field)

    async def log_tail(self, pod: Doc) -> str:
        """The informative lines at the end of buildkitd's log; empty if there are none."""
        path = paths.core("pods", *paths.key_of(pod), "log")
        lines: list[str] = []
        with suppress(BkpoolError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT):
                log = await self._api.text(path, tailLines=str(_LINES), container=pod_spec.CONTAINER)
                lines = informative_lines(log)
        return "\n".join(lines)

    async def last_event(self, pod: Doc) -> str:
        """The last warning about a pod, or else its last event, to append to a message.

        Its status does not mention volumes, networks and user namespaces.

        Returns:
            The text after a colon; empty if there is none.
        """
        namespace, selector = pod["metadata"]["namespace"], f"involvedObject.uid={pod_view.uid(pod)}"
        with suppress(BkpoolError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT):
                events, _ = await self._api.list(paths.core("events", namespace), fieldSelector=selector)
            texts = sorted(
                (event.get("type") == "Warning", event.get("lastTimestamp") or "", str(event.get("message", "")))
                for event in events
            )
            return f": {texts[-1][2][:_LONGEST]}" if texts else ""
        return ""
