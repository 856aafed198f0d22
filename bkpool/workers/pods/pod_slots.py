"""What is known of the pod in each slot: from watches, and from probes of pods that may be about to end.

It changes nothing in the cluster. A pod counts as ready only after it has answered a call itself.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState, Observation
from bkpool.core.subscribers import Subscribers
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.reflector import Change, KubeCollection, Reflector
from bkpool.workers.health import Health
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.pod_diagnosis import PodDiagnosis
from bkpool.workers.pods.pod_probe import PodProbe
from bkpool.workers.pods.pod_spec import SELECTOR
from bkpool.workers.pods.pod_writes import CLAIMS, PODS

log = structlog.get_logger(__name__)

_PROBES_AT_ONCE = 32  # of pods that were there before this process
_FAILED_PROBES = 3  # in a row, until a pod that may be about to end counts as down
_PROBE_PAUSE = 1.0  # seconds between these probes


@dataclass(slots=True)
class PodSlot:
    """A slot in memory."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while something of this slot is changed in the cluster."""
    observation: Observation | None = None
    pod_uid: str = ""
    """The pod that the fields below are about."""
    endpoint: str | None = None
    """Where the pod has answered, until it stops doing so."""
    failure: WorkerFailed | None = None
    """Why the pod has ended, once that is known."""
    inquiry: asyncio.Task[None] | None = None
    """Finds out whether the pod still answers, or why it has ended."""


class PodSlots:
    """The pods and volume claims of workers, and what they mean for each slot.

    Args:
        api: The cluster.
        probe: Reaches pods.
        diagnosis: Finds out why pods have ended.
        namespaces: Where pools may be; None: everywhere.
    """

    def __init__(
        self, api: KubeApi, probe: PodProbe, diagnosis: PodDiagnosis, namespaces: Sequence[str] | None
    ) -> None:
        self._probe = probe
        self._diagnosis = diagnosis
        self.health = Health(self._ask, self._refresh)
        self.pods = Reflector(
            api, KubeCollection("v1", PODS, SELECTOR), self._on_pod, namespaces=namespaces, fail_fast=True
        )
        self.claims = Reflector(
            api, KubeCollection("v1", CLAIMS, SELECTOR), self._on_claim, namespaces=namespaces, fail_fast=True
        )
        self._slots: defaultdict[Slot, PodSlot] = defaultdict(PodSlot)
        self._wanted: dict[Key, tuple[str | None, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.subscribers: Subscribers[[Slot]] = Subscribers()
        """Called with each slot whose pod or claim has changed."""

    def get(self, slot: Slot) -> PodSlot:
        """The slot; an empty one if nothing is known of it."""
        return self._slots[slot]

    def observe(self) -> Mapping[Slot, Observation]:
        """What is known of each slot that has a pod."""
        return {slot: entry.observation for slot, entry in self._slots.items() if entry.observation}

    def seen(self, slot: Slot) -> Observation | None:
        """What is known of one slot; None: it has no pod."""
        entry = self._slots.get(slot)
        return None if entry is None else entry.observation

    async def open(self) -> None:
        """Begins to watch, and probes every pod that is there.

        Raises:
            Forbidden: The rights to list or watch are missing.
        """
        runs = [self._spawn(reflector.run(), "watch") for reflector in (self.pods, self.claims)]
        ready = self._spawn(self._wait_for_lists(), "first lists")
        await asyncio.wait([*runs, ready], return_when=asyncio.FIRST_COMPLETED)
        for run in runs:
            if run.done():
                await run
        limit = asyncio.Semaphore(_PROBES_AT_ONCE)
        await asyncio.gather(*(self._adopt(pod, limit) for pod in self.pods))

    async def close(self) -> None:
        """Ends all background work."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def mark_ready(self, slot: Slot, pod_uid: str, endpoint: str) -> None:
        """Notes that a pod has answered at an endpoint; does nothing if another pod is in the slot by now."""
        self._refresh(slot)
        entry = self._slots[slot]
        if entry.pod_uid == pod_uid:
            entry.endpoint = endpoint
            self.health.began(slot)
            self._refresh(slot)

    def want(self, pool: Key, digest: str | None, authority: str) -> None:
        """Notes with what a pool's pods are made today.

        Args:
            pool: The pool.
            digest: Of what of its spec they are made with. Pods with another one are outdated. None: no pod of this
                pool is outdated, because no other could be made.
            authority: The mark of its CA. Pods of another one are replaced when they are not protected.
        """
        if self._wanted.get(pool) == (digest, authority):
            return
        self._wanted[pool] = digest, authority
        for slot in [slot for slot in self._slots if (slot.namespace, slot.pool) == pool]:
            self._refresh(slot)

    def is_lost(self, pod: Doc) -> bool:
        """Whether a pod is being deleted, and does not answer any more."""
        slot = pod_view.slot_in(pod)
        entry = self._slots[slot] if slot else PodSlot()
        return pod_view.deleted(pod) and not (entry.pod_uid == pod_view.uid(pod) and entry.endpoint is not None)

    def cache_owner_of(self, pod: Doc) -> str | None:
        """Digest of the owner of the cache that a pod uses: a volume claim's, or the pod's own."""
        claim = pod_view.claim_of(pod)
        doc = pod if claim is None else self.claims.get(claim)
        return None if doc is None else pod_view.cache_owner(doc)

    # --- changes ----------------------------------------------------------------------------------------------------

    def _on_pod(self, change: Change) -> None:
        slot = pod_view.slot_called(change.key)
        if slot is not None:
            self._refresh(slot)

    def _on_claim(self, change: Change) -> None:
        self._on_pod(change)
        if (slot := pod_view.slot_called(change.key)) is not None:
            self.subscribers.notify(slot)

    def _refresh(self, slot: Slot) -> None:
        """Brings what is known of a slot up to date with its pod."""
        entry, pod = self._slots[slot], self.pods.get(slot.worker)
        if pod is not None and pod_view.slot_in(pod) is None:
            pod = None
        pod_uid = pod_view.uid(pod) if pod else ""
        another = pod_uid != entry.pod_uid
        if another:
            entry.pod_uid, entry.endpoint, entry.failure = pod_uid, None, None
            self.health.ended(slot)
            if entry.inquiry:
                entry.inquiry.cancel()
                entry.inquiry = None
        before, entry.observation = entry.observation, self._observation(slot, entry, pod) if pod else None
        if another or entry.observation != before:
            self.subscribers.notify(slot)

    def _observation(self, slot: Slot, entry: PodSlot, pod: Doc) -> Observation | None:
        state = DaemonState.STARTING if entry.endpoint is None else DaemonState.READY
        message, log_tail = "", ""
        if pod_view.ended(pod):
            if pod_view.deleted(pod):
                return None  # it will be gone in a moment
            if entry.failure is None:
                # The state stays as it was until it is known why the pod has ended.
                self._inquire(entry, self._find_failure(pod))
            else:
                state = DaemonState.EXITED
                message, log_tail = entry.failure.message_and_hint, entry.failure.log_tail
        elif entry.endpoint is not None and pod_view.may_be_ending(pod):
            self._inquire(entry, self._probe_until_certain(pod))
        digest, made_by = pod_view.spec_digest(pod), pod_view.authority(pod)
        wanted, authority = self._wanted.get(pod_view.pool_of(pod), (None, made_by))
        return Observation(
            pod_view.worker_uid(pod),
            state,
            entry.endpoint or "",
            self.cache_owner_of(pod),
            message,
            log_tail,
            silence=self.health.silence(slot) if state is DaemonState.READY else None,
            ephemeral_cache=pod_view.claim_of(pod) is None,
            protected=pod_view.protected(pod),
            goes_unprotected=made_by != authority,
            spec_digest=digest,
            outdated=wanted is not None and digest != wanted,
            pod_name=paths.key_of(pod).name,
            pod_ip=pod_view.address(pod),
        )

    async def _ask(self, slot: Slot) -> None:
        """Returns when the pod in a slot has answered a call."""
        pod = self.pods.get(slot.worker)
        if pod is None or pod_view.ended(pod):
            raise Unavailable("the pod has ended")
        await self._probe.probe(pod)

    # --- inquiries --------------------------------------------------------------------------------------------------

    def _inquire(self, entry: PodSlot, inquiry: Coroutine[None, None, None]) -> None:
        """Starts an inquiry, if none runs. The end of one, and every change of the pod, lead here again."""
        if entry.inquiry is not None and not entry.inquiry.done():
            inquiry.close()
            return
        entry.inquiry = self._spawn(inquiry, "inquiry")

    async def _probe_until_certain(self, pod: Doc) -> None:
        """Probes a pod that is being deleted, or whose node is silent, until it fails several times in a row."""
        slot = pod_view.slot_in(pod)
        failures = 0
        while slot is not None and failures < _FAILED_PROBES:
            current = self.pods.get(slot.worker)
            if current is None or pod_view.ended(current) or not pod_view.may_be_ending(current):
                break
            failures = 0 if await self._probe.answers(current) else failures + 1
            await asyncio.sleep(_PROBE_PAUSE)
        if slot is not None:
            entry = self._slots[slot]
            entry.inquiry = None
            if failures >= _FAILED_PROBES:
                log.warning("worker.unreachable", worker=str(slot.worker))
                entry.endpoint = None
                self.health.ended(slot)
            self._refresh(slot)

    async def _find_failure(self, pod: Doc) -> None:
        slot = pod_view.slot_in(pod)
        if slot is None:
            return
        failure = await self._diagnosis.failure(pod)
        entry = self._slots[slot]
        entry.inquiry = None
        entry.failure = failure
        log.warning(
            "worker.exited", worker=str(slot.worker), message=failure.message_and_hint, log_tail=failure.log_tail
        )
        self._refresh(slot)

    async def _adopt(self, pod: Doc, limit: asyncio.Semaphore) -> None:
        """Probes a pod that was there before this process."""
        slot, endpoint = pod_view.slot_in(pod), self._probe.endpoint(pod)
        if slot is None or endpoint is None or pod_view.ended(pod) or pod_view.has_old_history(pod):
            return
        async with limit:
            if await self._probe.answers(pod):
                self.mark_ready(slot, pod_view.uid(pod), endpoint)
                log.info("worker.adopted", worker=str(slot.worker))

    async def _wait_for_lists(self) -> None:
        await self.pods.ready.wait()
        await self.claims.ready.wait()

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
