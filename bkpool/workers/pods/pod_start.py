"""One start of a pod: waits until it answers, reports what it waits for, and decides when the start has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from operator import is_not

from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.core.names import Slot
from bkpool.kube import Doc, paths
from bkpool.workers.daemons import ReportWaiting
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.pod_diagnosis import PodDiagnosis
from bkpool.workers.pods.pod_probe import PodProbe
from bkpool.workers.pods.pod_slots import PodSlots
from bkpool.workers.pods.pod_view import Stage, View
from bkpool.workers.pods.start_deadline import Deadlines, StartDeadline

_FIRST_RETRY, _LAST_RETRY = 0.025, 0.25  # seconds between probes
_CONSTANT_RETRY = 2.0  # seconds in which that pause does not grow: a pod whose image is there answers after one
_FIRST_PROBE_TIMEOUT, _LONGEST_PROBE_TIMEOUT = 0.5, 5.0  # seconds for one probe: a lost SYN is repeated after one


class PodStart:
    """Waits for the first answer of one pod.

    Args:
        slot: Where the pod is.
        pod: The pod, as it was when it was made or found.
        slots: What is known of pods.
        probe: Reaches the pod.
        diagnosis: Finds out why it fails.
        deadlines: How long each stage may take.
        report_waiting: Told what the start waits for.
        before_use: Called once the pod answers, and before anybody else learns that it does.
    """

    def __init__(
        self,
        slot: Slot,
        pod: Doc,
        *,
        slots: PodSlots,
        probe: PodProbe,
        diagnosis: PodDiagnosis,
        deadlines: Deadlines,
        report_waiting: ReportWaiting,
        before_use: Callable[[Doc], Awaitable[None]],
    ) -> None:
        self._slot = slot
        self._pod = pod
        self._slots = slots
        self._probe = probe
        self._diagnosis = diagnosis
        self._deadlines = deadlines
        self._report_waiting = report_waiting
        self._before_use = before_use
        self._deadline = StartDeadline(deadlines)
        self._clock = asyncio.get_running_loop().time
        self._probe_timeout = _FIRST_PROBE_TIMEOUT
        self._reason = "it does not listen"

    async def wait_for_answer(self, change_port: Callable[[Doc], bool]) -> str | None:
        """Waits until the pod answers.

        Args:
            change_port: Called with the pod if its host port is taken on every node. It returns whether to make the
                pod again with another port.

        Returns:
            The endpoint; None: the pod should be made again.

        Raises:
            WorkerFailed: The pod does not start, or cannot be used.
        """
        begun, pause = self._clock(), _FIRST_RETRY
        while True:
            current = self._slots.pods.get(self._slot.worker)
            view = await self._check(current)
            if view.port_taken and change_port(self._pod):
                return None
            endpoint = None if view.trouble or current is None else self._probe.endpoint(current)
            if current is not None and endpoint is not None and await self._answers(current):
                if self._deadline.message_to_report(View(Stage.RUNNING), self._clock()) is not None:
                    await self._report_waiting("")
                await self._before_use(current)
                self._slots.mark_ready(self._slot, pod_view.uid(self._pod), endpoint)
                return endpoint
            with suppress(TimeoutError):
                async with asyncio.timeout(pause if endpoint else self._deadline.time_to_change(self._clock())):
                    await self._slots.pods.until(self._slot.worker, partial(is_not, current))
            if self._clock() - begun > _CONSTANT_RETRY:
                pause = min(pause * 1.2, _LAST_RETRY)

    async def _answers(self, pod: Doc) -> bool:
        try:
            async with asyncio.timeout(self._probe_timeout):
                await self._probe.probe(pod)
        except TimeoutError:
            self._probe_timeout = min(self._probe_timeout * 2, _LONGEST_PROBE_TIMEOUT)
            self._reason = "it does not answer"
        except (Unavailable, WorkerFailed, HostFault) as error:
            self._reason = error.message
        else:
            return True
        return False

    async def _check(self, pod: Doc | None) -> View:
        """How far the pod has come. Raises WorkerFailed if it will not start."""
        key = paths.key_of(self._pod)
        if pod is None or pod_view.uid(pod) != pod_view.uid(self._pod) or self._slots.is_lost(pod):
            raise WorkerFailed(f"the pod {key} was deleted while it started", hint="It is made again.")
        if pod_view.ended(pod):
            raise await self._diagnosis.failure(pod)
        view, now = pod_view.look(pod), self._clock()
        message = self._deadline.message_to_report(view, now)
        if message is not None:
            await self._report_waiting(message)
        if self._deadline.has_passed(view, now):
            raise await self._failure(pod, view)
        return view

    async def _failure(self, pod: Doc, view: View) -> WorkerFailed:
        if view.final:
            return WorkerFailed(view.message, hint=f"Correct {view.field} of the pool.", field=view.field)
        if view.stage is Stage.RUNNING:
            return WorkerFailed(
                f"buildkitd has not answered {self._deadlines.answering:.0f} s after its start: {self._reason}",
                log_tail=await self._diagnosis.log_tail(pod),
            )
        event = "" if view.trouble else await self._diagnosis.last_event(pod)
        key, seconds = paths.key_of(pod), self._deadlines.of(view.stage)
        describe = f"kubectl -n {key.namespace} describe pod {key.name}"
        return WorkerFailed(
            f"{view.message}{event}; given up after {seconds:.0f} s",
            hint=f"Check {view.field} of the pool." if view.field else describe,
            field=view.field,
        )
