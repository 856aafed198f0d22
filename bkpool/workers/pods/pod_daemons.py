"""Starts, stops and observes the pods of workers, one in each slot.

A pod is probed from the moment it has an address; its own readiness is not waited for. Pods outlive the appliance.
Nothing here knows of leases, of the size of pools or of the time of day.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import structlog

from bkpool.core.allowances import Allowances, worker_refusals
from bkpool.core.cache_owner import must_be_wiped
from bkpool.core.errors import BkpoolError, Conflict, NotFound, Unavailable, WorkerFailed
from bkpool.core.names import Key, Slot
from bkpool.core.observation import MOST_STARTS, Observation, WorkerCapacity
from bkpool.core.pool import Pool, PoolSpec
from bkpool.kube import Doc
from bkpool.pki.authority import Authority
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.daemons import ReportWaiting
from bkpool.workers.history import not_cleared
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.host_ports import HostPorts
from bkpool.workers.pods.pod_diagnosis import PodDiagnosis
from bkpool.workers.pods.pod_probe import PodProbe
from bkpool.workers.pods.pod_slots import PodSlots
from bkpool.workers.pods.pod_spec import PRIVILEGED_IMAGE, ROOTLESS_IMAGE, PodRequest, isolation
from bkpool.workers.pods.pod_start import PodStart
from bkpool.workers.pods.pod_writes import PodWrites
from bkpool.workers.pods.start_deadline import Deadlines

log = structlog.get_logger(__name__)

_AT_ONCE = 1  # seconds: with 0 the API server forgets a pod whose processes may still run
_TRIES = 5  # in one start: another replica may make a pod meanwhile, or a host port may be taken


class PodDaemons:
    """Implements `Daemons` with pods.

    Args:
        slots: What is known of pods.
        writes: Changes the cluster.
        probe: Reaches pods.
        diagnosis: Finds out why pods fail.
        host_ports: The host ports for pods; None: pods are reached at their own address.
        image: The image of a pool that names none; None: BuildKit's own, rootless unless the pool is `privileged`.
        ignored_spec_fields: Fields of a pool's spec that nothing reads here.
        deadlines: How long each stage of a start may take.
        authorities: Issue the workers' certificates.
        allowed: What pools may ask for; None: everything.
    """

    def __init__(
        self,
        slots: PodSlots,
        writes: PodWrites,
        probe: PodProbe,
        diagnosis: PodDiagnosis,
        *,
        host_ports: HostPorts | None,
        image: str | None,
        ignored_spec_fields: Collection[str],
        deadlines: Deadlines,
        authorities: PoolAuthorities,
        allowed: Allowances | None = None,
    ) -> None:
        self.capacity = None if host_ports is None else _capacity(len(host_ports))
        self.starts_at_once = MOST_STARTS
        self.ignored_spec_fields = ignored_spec_fields
        self._slots = slots
        self._writes = writes
        self._probe = probe
        self._diagnosis = diagnosis
        self._ports = host_ports
        self._image = image
        self._deadlines = deadlines
        self._authorities = authorities
        self._allowed = allowed

    def ignored_config(self, spec: PoolSpec) -> list[str]:
        """What is not taken from the pool's own buildkitd.toml; see `Daemons`."""
        return self._writes.ignored_config(spec)

    def observe(self) -> Mapping[Slot, Observation]:
        """The pod in each slot; see `Daemons`."""
        return self._slots.observe()

    def seen(self, slot: Slot) -> Observation | None:
        """The pod in one slot; see `Daemons`."""
        return self._slots.seen(slot)

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back when `observe()` may have changed; returns a function that unsubscribes. See `Daemons`."""
        return self._slots.subscribers.add(callback)

    async def watch_health(self) -> None:
        """Asks the pods in turn; see `Daemons`. Only one replica does: the one that runs the controller."""
        await self._slots.health.run()

    async def answers(self, slot: Slot, worker_uid: str, *, fresh: bool = True) -> bool:
        """Whether the worker's pod answers; see `Daemons`."""
        pod = self._slots.pods.get(slot.worker)
        if pod is None or pod_view.worker_uid(pod) != worker_uid or pod_view.has_old_history(pod):
            return False
        if self._slots.get(slot).endpoint is not None:
            return await self._slots.health.answers(slot, fresh=fresh)
        endpoint = self._probe.endpoint(pod)  # another replica has started it
        if endpoint is None or not await self._probe.answers(pod):
            return False
        self._slots.mark_ready(slot, pod_view.uid(pod), endpoint)
        return True

    async def start(
        self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, report_waiting: ReportWaiting
    ) -> str:
        """Starts a pod in the slot with this owner's cache; see `Daemons`."""
        entry = self._slots.get(slot)
        async with entry.lock:
            taken: set[int] = set()
            for tries_left in reversed(range(_TRIES)):
                pod = await self._find_usable(slot, worker_uid, owner)
                made = pod is None
                pod = pod or await self._make(slot, worker_uid, owner, pool, taken)
                if pod is None:
                    continue  # another replica has made one meanwhile: it is examined like any other
                if entry.endpoint is not None and entry.pod_uid == pod_view.uid(pod):
                    return entry.endpoint
                start = PodStart(
                    slot,
                    pod,
                    slots=self._slots,
                    probe=self._probe,
                    diagnosis=self._diagnosis,
                    deadlines=self._deadlines,
                    report_waiting=report_waiting,
                    before_use=self._begin_history,
                )
                try:
                    endpoint = await start.wait_for_answer(self._port_changer(taken) if tries_left else _keep_port)
                except WorkerFailed:
                    if made or owner is None:  # the builds of a holder may run in it, and only we cannot reach it
                        with suppress(BkpoolError):
                            await self._writes.discard(pod)
                    raise
                if endpoint is not None:
                    return endpoint
                await self._writes.end(slot)
            raise Conflict(f"the pod {slot.worker} is being changed by another program all the time")

    async def clear_history(self, slot: Slot) -> None:
        """Clears the build history, or ends the pod; see `Daemons`."""
        async with self._slots.get(slot).lock:
            pod = self._slots.pods.get(slot.worker)
            if pod is None or pod_view.ended(pod):
                return
            try:
                await self._probe.clear_history(pod)
            except (Unavailable, WorkerFailed) as error:
                log.warning("worker.history_not_cleared", worker=str(slot.worker), reason=error.message)
                await self._writes.end(slot)

    async def stop(self, slot: Slot, *, at_once: bool = False) -> None:
        """Ends the pod and removes its key. A volume stays. See `Daemons`."""
        async with self._slots.get(slot).lock:
            await (self._writes.end(slot, grace=_AT_ONCE) if at_once else self._writes.end(slot))
            await self._writes.remove_secret(slot)

    async def protect(self, slot: Slot, *, held: bool) -> None:
        """Tells autoscalers and disruption budgets whether they may remove the pod; see `Daemons`."""
        async with self._slots.get(slot).lock:
            pod = self._slots.pods.get(slot.worker)
            if pod is not None:
                with suppress(NotFound):
                    await self._writes.protect(pod, held=held)
                    if not held and self._is_outdated(pod):
                        await self._writes.retire(pod)

    async def follow(self, pool: Pool) -> None:
        """Changes what the pool's pods may reach. If there are none yet, their start does it; see `Daemons`.

        A pod of a former CA is replaced, if its worker is not leased. Other pods that were made with another spec are
        observed as outdated.
        """
        self._slots.want(pool.key, self._digest(pool), self._authorities.current(pool.key).mark)
        pods = self._pods_of(pool.key)
        if pods:
            await self._writes.apply_egress(pool)
        for pod in pods:
            if self._is_outdated(pod) and not pod_view.protected(pod):
                await self._writes.retire(pod)

    def current_authority(self, pool: Key) -> Authority:
        """The CA that signs for the workers of a pool now."""
        return self._authorities.current(pool)

    def former_authority(self, pool: Key) -> Authority | None:
        """The CA of those workers of a pool that were not made with its current one; None if there are none."""
        marks = {pod_view.authority(pod) for pod in self._pods_of(pool) if self._is_outdated(pod)}
        found = [one for mark in sorted(marks) for one in self._authorities.of_worker(pool, mark)]
        return found[0] if found else None

    def _pods_of(self, pool: Key) -> list[Doc]:
        return [pod for pod in self._slots.pods if pod_view.slot_in(pod) and pod_view.pool_of(pod) == pool]

    def _is_outdated(self, pod: Doc) -> bool:
        return pod_view.authority(pod) != self._authorities.current(pod_view.pool_of(pod)).mark

    # --- one slot, under its lock -----------------------------------------------------------------------------------

    async def _find_usable(self, slot: Slot, worker_uid: str, owner: str | None) -> Doc | None:
        """The pod in the slot, if it is this worker's and this owner may use its cache. Any other one is ended."""
        pod = self._slots.pods.get(slot.worker)
        if pod is None:
            return None
        same_worker = pod_view.worker_uid(pod) == worker_uid
        fits = same_worker and not must_be_wiped(self._slots.cache_owner_of(pod), owner)
        if fits and not pod_view.ended(pod) and not self._slots.is_lost(pod):
            if owner is not None:
                await self._writes.own(pod, owner)
            return pod
        # If another program has deleted the pod of the same holder, the pod gets its full grace period, because a
        # build may be running in it.
        await self._writes.end(slot, hurry=not (fits and owner is not None and pod_view.deleted(pod)))
        return None

    async def _make(self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, taken: set[int]) -> Doc | None:
        if self._allowed is not None and (refused := worker_refusals(pool, self._allowed)):
            raise WorkerFailed(refused[0].message, field=refused[0].field)
        request = PodRequest(slot, worker_uid, owner, pool, self._default_image(pool))
        if self._ports is None:
            pod = await self._writes.make(request)
        else:
            with self._ports.reserved(self._used_ports() | taken) as port:
                pod = await self._writes.make(request.with_host_port(port))
        if pod is not None:
            log.info("worker.pod_created", worker=str(slot.worker), pod=pod_view.uid(pod))
        return pod

    def _default_image(self, pool: Pool) -> str:
        return self._image or (ROOTLESS_IMAGE if isolation(pool).rootless else PRIVILEGED_IMAGE)

    def _digest(self, pool: Pool) -> str | None:
        """The digest of what the pool's pods are made with today; None: none can be made, so those that run stay."""
        if self._allowed is not None and worker_refusals(pool, self._allowed):
            return None
        try:
            return self._writes.digest(pool, self._default_image(pool))
        except WorkerFailed:
            return None

    async def _begin_history(self, pod: Doc) -> None:
        """Clears what a volume of the whole pool brings along. The pod is not ready yet, so nobody is connected.

        Raises:
            WorkerFailed: It could not be cleared. The pod and the volume are removed.
        """
        slot = pod_view.slot_in(pod)
        if slot is None or not pod_view.has_old_history(pod):
            return
        try:
            await self._probe.clear_history(pod)
            await self._writes.note_history_cleared(pod)
        except (Unavailable, WorkerFailed) as error:
            await self._writes.end(slot)
            await self._writes.remove_claim(slot)
            raise not_cleared(error) from None

    def _port_changer(self, taken: set[int]) -> Callable[[Doc], bool]:
        """Notes the pod's port as taken, if there is another one to try."""

        def change_port(pod: Doc) -> bool:
            port = pod_view.host_port(pod)
            if self._ports is None or port is None or not self._ports.any_free(self._used_ports() | taken | {port}):
                return False
            taken.add(port)
            return True

        return change_port

    def _used_ports(self) -> set[int]:
        return {port for pod in self._slots.pods if (port := pod_view.host_port(pod)) is not None}


def _keep_port(_pod: Doc) -> bool:
    return False


def _capacity(host_ports: int) -> WorkerCapacity:
    limit = f"this cluster has host ports for {host_ports} workers (kind-config.yaml)"
    return WorkerCapacity(host_ports, limit, reason="TooFewHostPorts")
