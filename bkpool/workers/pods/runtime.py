"""The runtime of a cluster: each worker is a pod, reached over mTLS, and ready when buildkitd says so itself.

It watches instead of asking, and probes a pod from the moment it has an address instead of waiting for its status.
Pods outlive the appliance. It knows nothing of leases, pools' sizes or time of day.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from operator import is_not

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound, Unavailable, WorkerFailed
from bkpool.core.names import WORKER_PORT, Slot
from bkpool.core.pool import Pool
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.reflector import Change, KubeCollection, Reflector
from bkpool.pki.authority import Authority
from bkpool.workers import DaemonState, Observation, Told, WorkerCapacity
from bkpool.workers.ignored_fields import IGNORED_IN_CLUSTER
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.host_ports import HostPorts
from bkpool.workers.pods.pod_spec import PRIVILEGED_IMAGE, ROOTLESS_IMAGE, SELECTOR, Isolation, Wanted, isolation
from bkpool.workers.pods.pod_view import Stage, View
from bkpool.workers.pods.pod_words import PodWords
from bkpool.workers.pods.pod_writes import CLAIMS, PODS, PodWrites, foreign
from bkpool.workers.pods.start_deadline import Deadlines, StartDeadline
from bkpool.workers.probe import probe_tls, tcp_endpoint

__all__ = ["Deadlines", "PodRuntime"]

log = structlog.get_logger(__name__)

_TRIES = 5  # pods made by somebody else meanwhile, or host ports that turn out to be taken, in one start
_FIRST_RETRY, _LAST_RETRY = 0.025, 0.25  # seconds between probes of a pod that is coming up
_EAGER = 2.0  # seconds in which the pause does not grow: with its image there a pod answers after half of that
_FIRST_PATIENCE, _LONGEST_PATIENCE = 0.5, 5.0  # seconds for one probe: a lost SYN is sent again after one
_GREETING = 3.0  # seconds for a pod that has been up for long
_GREETINGS = 32  # at once
_DOUBTS, _DOUBT_PAUSE = 3, 1.0  # failed probes in a row, and seconds between them, until a doubtful pod is down


@dataclass(slots=True)
class _PodSlot:
    """A slot in memory."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    seen: Observation | None = None
    pod: str = ""
    """The uid of the pod that the rest is about."""
    endpoint: str | None = None
    """Where it has answered, while it does."""
    failure: WorkerFailed | None = None
    """How it ended, once that is known."""
    asking: asyncio.Task[None] | None = None
    """Finds out whether it still answers, or how it ended."""


class PodRuntime:
    """Runs workers as pods; implements Runtime.

    Args:
        api: The cluster. Whoever made it closes it.
        backend: Issues the workers' certificates.
        context: For probes: of `pki.worker_tls.worker_context`.
        image: Where a pool names none; None: the rootless one of BuildKit's own, or the other one for `privileged`.
        host_ports: The ports of `host` that lead to the cluster's node, where pods' addresses lead nowhere (kind).
        host: The address at which these ports are.
        namespaces: Where pools may be; None: everywhere.
        ignored_spec_fields: Fields of a pool's spec that nothing reads here (`workers.ignored_fields`).
        now: The clock, for certificates.
        deadlines: How long anything may take.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        backend: Authority,
        context: ssl.SSLContext,
        image: str | None = None,
        host_ports: Sequence[int] | None = None,
        host: str = "127.0.0.1",
        namespaces: Sequence[str] | None = None,
        ignored_spec_fields: Collection[str] = IGNORED_IN_CLUSTER,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        deadlines: Deadlines | None = None,
    ) -> None:
        self.capacity = None if host_ports is None else _capacity(len(host_ports))
        self.ignored_spec_fields = ignored_spec_fields
        self._context = context
        self._image = image
        self._ports = None if host_ports is None else HostPorts(host_ports)
        self._host = host
        self._deadlines = deadlines or Deadlines()
        self._pods = Reflector(
            api, KubeCollection("v1", PODS, SELECTOR), self._pod_changed, namespaces=namespaces, fail_fast=True
        )
        self._claims = Reflector(
            api, KubeCollection("v1", CLAIMS, SELECTOR), self._claim_changed, namespaces=namespaces, fail_fast=True
        )
        self._writes = PodWrites(
            api, backend, pods=self._pods, claims=self._claims, now=now, ending=self._deadlines.ending
        )
        self._words = PodWords(api)
        self._places: defaultdict[Slot, _PodSlot] = defaultdict(_PodSlot)
        self._tasks: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[], None]] = []

    # --- Runtime ----------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Learns what there is, and asks every pod whether it answers.

        Raises:
            Forbidden: The rights to look are missing.
        """
        runs = [self._spawn(reflector.run(), "watch") for reflector in (self._pods, self._claims)]
        ready = self._spawn(self._both_ready(), "first lists")
        await asyncio.wait([*runs, ready], return_when=asyncio.FIRST_COMPLETED)
        for run in runs:
            if run.done():
                await run
        limit = asyncio.Semaphore(_GREETINGS)
        await asyncio.gather(*(self._greet(pod, limit) for pod in self._pods))

    def observe(self) -> Mapping[Slot, Observation]:
        """Every pod of a worker."""
        return {slot: place.seen for slot, place in self._places.items() if place.seen}

    def caches(self) -> Mapping[Slot, str | None]:
        """Every volume claim, with its owner. A cache that ends with its pod is none to come back to."""
        claims = [(pod_view.slot_in(claim), claim) for claim in self._claims if not pod_view.deleted(claim)]
        return {slot: pod_view.cache_owner(claim) for slot, claim in claims if slot}

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back whenever observe() or caches() may have changed."""
        self._callbacks.append(callback)

    async def start(self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, told: Told) -> str:
        """Brings a pod up in the slot, with this owner's cache; see Runtime."""
        place = self._places[slot]
        async with place.lock:
            taken: set[int] = set()
            for left in reversed(range(_TRIES)):
                pod = await self._standing(slot, worker_uid, owner)
                made = pod is None
                pod = pod or await self._make(slot, worker_uid, owner, pool, taken)
                if pod is None:
                    continue  # somebody else's came first: it is looked at as any other
                if place.endpoint is not None and place.pod == pod_view.uid(pod):
                    return place.endpoint
                try:
                    endpoint = await self._first_answer(slot, pod, told, taken if left else None)
                except WorkerFailed:
                    if made or owner is None:  # one that has a holder may have builds that only we do not reach
                        with suppress(BkpoolError):
                            await self._writes.drop(pod)
                    raise
                if endpoint is not None:
                    return endpoint
                await self._writes.end(slot)
            raise Conflict(f"the pod {slot.worker} is being changed by somebody else all the time")

    async def own(self, slot: Slot, owner: str) -> None:
        """Writes whose the cache in this slot is, and that its worker is leased; see Runtime."""
        async with self._places[slot].lock:
            pod = self._pods.get(slot.worker)
            if pod is None:
                raise NotFound(f"the pod {slot.worker} is gone")
            await self._writes.own(pod, owner)

    async def protect(self, slot: Slot, *, held: bool) -> None:
        """Tells autoscalers and disruption budgets; see Runtime."""
        async with self._places[slot].lock:
            pod = self._pods.get(slot.worker)
            if pod is not None:
                with suppress(NotFound):
                    await self._writes.protect(pod, held=held)

    async def follow(self, pool: Pool) -> None:
        """Changes what the pool's workers may reach; see Runtime. Where there are none yet, their start will."""
        slots = [pod_view.slot_in(pod) for pod in self._pods]
        if any(slot and (slot.namespace, slot.pool) == pool.key for slot in slots):
            await self._writes.fence(pool)

    async def stop(self, slot: Slot) -> None:
        """Ends the pod and removes its key; a volume stays."""
        async with self._places[slot].lock:
            await self._writes.end(slot)
            await self._writes.forget_secret(slot)

    async def wipe(self, slot: Slot) -> None:
        """Ends the pod and removes its volume."""
        async with self._places[slot].lock:
            await self._writes.end(slot)
            await self._writes.forget_secret(slot)
            await self._writes.remove_claim(slot)

    async def close(self, *, stop_workers: bool) -> None:  # noqa: ARG002 - pods outlive this process
        """Lets go of everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one slot, under its lock -----------------------------------------------------------------------------------

    async def _standing(self, slot: Slot, worker_uid: str, owner: str | None) -> Doc | None:
        """The pod in the slot, if it is this worker's and may have this owner; what may not be there is ended."""
        pod = self._pods.get(slot.worker)
        if pod is None:
            return None
        mine = pod_view.worker_uid(pod) == worker_uid and not foreign(self._owner_of(pod), owner)
        if mine and not pod_view.ended(pod) and not self._being_ended(pod):
            if owner is not None:
                await self._writes.own(pod, owner)
            return pod
        # One that somebody else ends, and whose holder is the same, ends as it likes: it may wait for a build.
        await self._writes.end(slot, hurry=not (mine and owner is not None and pod_view.deleted(pod)))
        return None

    async def _make(self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, taken: set[int]) -> Doc | None:
        default = PRIVILEGED_IMAGE if isolation(pool) is Isolation.PRIVILEGED else ROOTLESS_IMAGE
        wanted = Wanted(slot, worker_uid, owner, pool, self._image or default)
        if self._ports is None:
            pod = await self._writes.make(wanted)
        else:
            with self._ports.reserved(self._used_ports() | taken) as port:
                pod = await self._writes.make(wanted.at(port))
        if pod is not None:
            log.info("worker.pod_created", worker=str(slot.worker), pod=pod_view.uid(pod))
        return pod

    async def _first_answer(self, slot: Slot, pod: Doc, told: Told, taken: set[int] | None) -> str | None:
        """Waits until the pod answers; returns its endpoint.

        Args:
            slot: Where it is.
            pod: The pod.
            told: Told what it waits for.
            taken: Host ports that are of no use, to which its own is added, and None is returned, if it is one of
                them and there is another. None: it is not moved any more.

        Raises:
            WorkerFailed: It does not come up.
        """
        this, uid = pod_view.uid(pod), pod_view.worker_uid(pod)
        patience, clock = StartDeadline(self._deadlines), asyncio.get_running_loop().time
        pause, limit, said, begun = _FIRST_RETRY, _FIRST_PATIENCE, "it does not listen", clock()
        while True:
            seen = self._pods.get(slot.worker)
            view = await self._on_its_way(seen, pod, said, patience, told)
            if view.port_taken and taken is not None and self._may_move(pod, taken):
                return None
            address = None if view.trouble or seen is None else self._address(seen)
            if address is not None:
                try:
                    async with asyncio.timeout(limit):
                        await probe_tls(*address, self._context, uid)
                except TimeoutError:
                    limit, said = min(limit * 2, _LONGEST_PATIENCE), "it does not answer"
                except (Unavailable, WorkerFailed) as error:
                    said = error.message
                else:
                    if patience.look(View(Stage.RUNNING), clock()) is not None:
                        await told("")
                    return self._answered(slot, this, tcp_endpoint(*address))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause if address is not None else patience.left(clock())):
                    await self._pods.until(slot.worker, partial(is_not, seen))
            if clock() - begun > _EAGER:
                pause = min(pause * 1.2, _LAST_RETRY)

    async def _on_its_way(self, pod: Doc | None, made: Doc, said: str, patience: StartDeadline, told: Told) -> View:
        """How far the pod has come that was made. Raises WorkerFailed if it will not come any further."""
        key = paths.key_of(made)
        if pod is None or pod_view.uid(pod) != pod_view.uid(made) or self._being_ended(pod):
            raise WorkerFailed(f"the pod {key} was deleted while it started", hint="It is made again.")
        if pod_view.ended(pod):
            raise await self._words.failure(pod)
        view, now = pod_view.look(pod), asyncio.get_running_loop().time()
        message = patience.look(view, now)
        if message is not None:
            await told(message)
        if not patience.ended(view, now):
            return view
        if view.final:
            raise WorkerFailed(view.message, hint=f"Correct {view.field} of the pool.", field=view.field)
        if view.stage is Stage.RUNNING:
            raise WorkerFailed(
                f"buildkitd has not answered {self._deadlines.answering:.0f} s after its start: {said}",
                log_tail=await self._words.log_tail(pod),
            )
        event = "" if view.trouble else await self._words.of_the_cluster(pod)
        seconds = self._deadlines.of(view.stage)
        raise WorkerFailed(
            f"{view.message}{event}; given up after {seconds:.0f} s",
            hint=f"Check {view.field} of the pool."
            if view.field
            else f"kubectl -n {key.namespace} describe pod {key.name}",
            field=view.field,
        )

    def _may_move(self, pod: Doc, taken: set[int]) -> bool:
        port = pod_view.host_port(pod)
        if self._ports is None or port is None or not self._ports.any_free(self._used_ports() | taken | {port}):
            return False
        taken.add(port)
        return True

    def _used_ports(self) -> set[int]:
        return {port for pod in self._pods if (port := pod_view.host_port(pod)) is not None}

    def _owner_of(self, pod: Doc) -> str | None:
        """Whose the cache is that this pod has."""
        claim = pod_view.claim_of(pod)
        doc = pod if claim is None else self._claims.get(claim)
        return None if doc is None else pod_view.cache_owner(doc)

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _pod_changed(self, change: Change) -> None:
        slot = pod_view.slot_called(change.key)
        if slot is not None:
            self._look(slot)

    def _claim_changed(self, change: Change) -> None:
        self._pod_changed(change)
        self._changed()

    def _look(self, slot: Slot) -> None:
        """Brings what is known of a slot up to date with its pod."""
        place, pod = self._places[slot], self._pods.get(slot.worker)
        if pod is not None and pod_view.slot_in(pod) is None:
            pod = None
        this = pod_view.uid(pod) if pod else ""
        if this != place.pod:
            place.pod, place.endpoint, place.failure = this, None, None
            if place.asking:
                place.asking.cancel()
                place.asking = None
        before, place.seen = place.seen, self._seen(place, pod) if pod else None
        if place.seen != before:
            self._changed()

    def _seen(self, place: _PodSlot, pod: Doc) -> Observation | None:
        state, message, log_tail = DaemonState.STARTING if place.endpoint is None else DaemonState.READY, "", ""
        if pod_view.ended(pod):
            if pod_view.deleted(pod):
                return None  # as good as gone
            if place.failure is None:
                self._ask(place, self._learn_ending(pod))  # it stays what it was until it is known why it ended
            else:
                state = DaemonState.EXITED
                message, log_tail = place.failure.message_and_hint, place.failure.log_tail
        elif place.endpoint is not None and pod_view.doubtful(pod):
            self._ask(place, self._doubt(pod))
        return Observation(
            pod_view.worker_uid(pod),
            state,
            place.endpoint or "",
            self._owner_of(pod),
            message,
            log_tail,
            ephemeral_cache=pod_view.claim_of(pod) is None,
            protected=pod_view.held(pod),
            pod_name=paths.key_of(pod).name,
            pod_ip=pod_view.address(pod),
        )

    def _ask(self, place: _PodSlot, question: Coroutine[None, None, None]) -> None:
        """One question at a time; what a new one would find out, the next change or the present one will."""
        if place.asking is not None and not place.asking.done():
            question.close()
            return
        place.asking = self._spawn(question, "question")

    async def _doubt(self, pod: Doc) -> None:
        """Asks a pod that is being deleted, or whose node is silent, whether it still answers."""
        slot = pod_view.slot_in(pod)
        failures = 0
        while slot is not None and failures < _DOUBTS:
            current = self._pods.get(slot.worker)
            if current is None or pod_view.ended(current) or not pod_view.doubtful(current):
                break
            failures = 0 if await self._reaches(current) else failures + 1
            await asyncio.sleep(_DOUBT_PAUSE)
        if slot is not None:
            place = self._places[slot]
            place.asking = None
            if failures >= _DOUBTS:
                log.warning("worker.silent", worker=str(slot.worker))
                place.endpoint = None
            self._look(slot)

    async def _learn_ending(self, pod: Doc) -> None:
        slot = pod_view.slot_in(pod)
        if slot is None:
            return
        failure = await self._words.failure(pod)
        place = self._places[slot]
        place.asking = None
        place.failure = failure
        log.warning(
            "worker.exited", worker=str(slot.worker), message=failure.message_and_hint, log_tail=failure.log_tail
        )
        self._look(slot)

    async def _greet(self, pod: Doc, limit: asyncio.Semaphore) -> None:
        slot, address = pod_view.slot_in(pod), self._address(pod)
        if slot is None or address is None or pod_view.ended(pod):
            return
        async with limit:
            if await self._reaches(pod):
                self._answered(slot, pod_view.uid(pod), tcp_endpoint(*address))
                log.info("worker.adopted", worker=str(slot.worker))

    async def _reaches(self, pod: Doc) -> bool:
        address = self._address(pod)
        with suppress(TimeoutError, Unavailable, WorkerFailed):
            if address is not None:
                async with asyncio.timeout(_GREETING):
                    await probe_tls(*address, self._context, pod_view.worker_uid(pod))
                return True
        return False

    def _answered(self, slot: Slot, this: str, endpoint: str) -> str:
        """Notes that this pod answers."""
        self._look(slot)
        place = self._places[slot]
        if place.pod == this:
            place.endpoint = endpoint
            self._look(slot)
        return endpoint

    def _being_ended(self, pod: Doc) -> bool:
        """Whether it is being deleted, and does not even answer until then."""
        slot = pod_view.slot_in(pod)
        place = self._places[slot] if slot else _PodSlot()
        return pod_view.deleted(pod) and not (place.pod == pod_view.uid(pod) and place.endpoint is not None)

    def _address(self, pod: Doc) -> tuple[str, int] | None:
        """Where it can be reached."""
        if self._ports is not None:
            port = pod_view.host_port(pod)
            return None if port is None else (self._host, port)
        address = pod_view.address(pod)
        return None if address is None else (address, WORKER_PORT)

    # --- small things -----------------------------------------------------------------------------------------------

    async def _both_ready(self) -> None:
        await self._pods.ready.wait()
        await self._claims.ready.wait()

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _changed(self) -> None:
        for callback in self._callbacks:
            callback()


def _capacity(host_ports: int) -> WorkerCapacity:
    limit = f"this cluster has host ports for {host_ports} workers (kind-config.yaml)"
    return WorkerCapacity(host_ports, limit, reason="TooFewHostPorts")
