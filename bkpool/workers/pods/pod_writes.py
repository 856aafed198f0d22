"""Makes, marks and removes what a worker is in a cluster; a crash after any write is mended by the next start.

The order is the rule: a cache has its owner before a pod can use it, a pod is gone before its volume goes, and both
are gone before another's are made. Whether and when is for others to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from bkpool.core.errors import Conflict, Forbidden, InvalidInput, NotFound, WorkerFailed
from bkpool.core.names import ANNOTATION_CACHE_OWNER, LABEL_MANAGED, MANAGER, Key, Slot
from bkpool.core.pool import LocalCache, Pool
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.reflector import Reflector
from bkpool.pki.authority import Authority
from bkpool.workers.config import render
from bkpool.workers.pods import pod_spec, pod_view
from bkpool.workers.pods.egress import egress_key, egress_policy

PODS, CLAIMS = "pods", "persistentvolumeclaims"
_GRACE = 5  # seconds for buildkitd to end: it has no build any more
_TRIES = 5  # of a compare-and-swap: a kubelet writes a young pod's status a few times a second


class PodWrites:
    """The writes.

    Args:
        api: The cluster.
        backend: Issues the workers' certificates.
        pods: The pods of workers.
        claims: The volume claims of workers.
        now: The clock.
        ending: Seconds until what is being deleted must be gone.
    """

    def __init__(
        self,
        api: KubeApi,
        backend: Authority,
        *,
        pods: Reflector,
        claims: Reflector,
        now: Callable[[], datetime],
        ending: float,
    ) -> None:
        self._api = api
        self._backend = backend
        self._pods = pods
        self._claims = claims
        self._now = now
        self._ending = ending
        self._configured: dict[Key, tuple[str, str]] = {}
        """What each pool's ConfigMap was last written for: the pool's uid, and the text."""
        self._open: dict[Key, str] = {}
        """The pools that are known to have no policy for their workers: its key, and the pool's uid."""

    async def make(self, wanted: pod_spec.Wanted) -> Doc | None:
        """Makes a pod with all that it needs; None: one was there already, and is known now.

        Raises:
            WorkerFailed: The pool asks for what the cluster does not take; the message names the field.
        """
        slot, pool = wanted.slot, wanted.pool
        pod, toml = pod_spec.pod(wanted), render(pool.spec, None)  # both may refuse: before anything is written
        if (local := pool.spec.local_cache) is not None:
            await self._claim(slot, pool, local, wanted.owner)
        await self.fence(pool)
        await self._configure(slot, pool, toml)
        leaf = self._backend.issue_worker(wanted.worker_uid, self._now())
        secret = pod_spec.secret(slot, pool, leaf, self._backend.cert_pem)
        with _admission("Secret"):
            await self._api.apply(paths.core("secrets", *slot.worker), secret)
        with _admission("pod"):
            return await self._create(self._pods, PODS, pod)

    async def fence(self, pool: Pool) -> None:
        """Lets the pool's workers reach what its spec says, and nothing else.

        Raises:
            WorkerFailed: It cannot be said in this cluster, or somebody else's policy has the name.
        """
        key, policy = egress_key(pool), egress_policy(pool)
        if policy is None and self._open.get(key) == pool.uid:
            return
        path = paths.group("networking.k8s.io/v1", "networkpolicies", *key)
        self._open.pop(key, None)
        with _admission("NetworkPolicy"):
            try:
                live = _ours("NetworkPolicy", key, await self._api.get(path))
            except NotFound:
                live = None
            if policy is not None:  # each time: whoever has removed it is not heard of
                await self._api.apply(path, policy)
                return
            if live is not None:
                with suppress(NotFound):
                    await self._api.delete(path, uid=pod_view.uid(live))
        self._open[key] = pool.uid

    async def own(self, pod: Doc, owner: str) -> None:
        """Writes whose the cache is, and that the worker is leased.

        Raises:
            Conflict: The cache is another's, or the pod another one.
            NotFound: The pod is gone.
        """
        claim = pod_view.claim_of(pod)
        if claim is not None:
            await self._mark(self._claims, CLAIMS, claim, lambda doc: _owning(doc, owner))

        def change(current: Doc) -> Doc | None:
            if pod_view.uid(current) != pod_view.uid(pod):
                raise Conflict(f"the pod {claim or paths.key_of(pod)} is another one by now")
            owning = None if claim else _owning(current, owner)
            if owning is None and pod_view.held(current):
                return None
            metadata = pod_spec.protection(held=True)
            metadata["annotations"] |= (owning or {}).get("annotations", {})
            return metadata

        await self._mark(self._pods, PODS, paths.key_of(pod), change)

    async def protect(self, pod: Doc, *, held: bool) -> None:
        """Asks others to leave the pod alone, or no longer. Raises NotFound."""
        await self._mark(
            self._pods,
            PODS,
            paths.key_of(pod),
            lambda current: None if pod_view.held(current) is held else pod_spec.protection(held=held),
        )

    async def end(self, slot: Slot, *, hurry: bool = True) -> None:
        """Ends the pod in a slot and waits until it is gone.

        Args:
            slot: Which slot.
            hurry: Not as it would end by itself, but within seconds. A kubelet does not heed that any more once the
                pod's hook waits for its connections to end (seen with 1.34).

        Raises:
            WorkerFailed: It does not go.
        """
        while (pod := self._pods.get(slot.worker)) is not None:
            if hurry or not pod_view.deleted(pod):
                await self._delete(self._pods, PODS, pod, grace=_GRACE if hurry else None)
            await self._gone(self._pods, "pod", pod)

    async def drop(self, pod: Doc) -> None:
        """Asks for the end of a pod that is of no use, without waiting."""
        slot = pod_view.slot_in(pod)
        if slot is not None:
            self._configured.pop(_pool_of(slot), None)  # whatever was wrong: it is written again
        await self._delete(self._pods, PODS, pod, grace=_GRACE)

    async def forget_secret(self, slot: Slot) -> None:
        """Removes the worker's key."""
        with suppress(NotFound):
            await self._api.delete(paths.core("secrets", *slot.worker))

    async def remove_claim(self, slot: Slot) -> None:
        """Removes the cache of a slot without a pod and waits until it is gone. Raises WorkerFailed: it stays."""
        while (claim := self._claims.get(slot.worker)) is not None:
            if not pod_view.deleted(claim):
                await self._delete(self._claims, CLAIMS, claim)
            await self._gone(self._claims, "volume claim", claim)

    # --- parts of these ---------------------------------------------------------------------------------------------

    async def _claim(self, slot: Slot, pool: Pool, local: LocalCache, owner: str | None) -> None:
        """Sees to it that the slot's volume claim is there, and clean or the owner's."""
        key = slot.worker
        for _ in range(_TRIES):
            claim = self._claims.get(key)
            if claim is None:
                wanted = pod_spec.volume(slot, pool, local, owner)
                with _admission("volume claim"):
                    if await self._create(self._claims, CLAIMS, wanted) is not None:
                        return
            elif pod_view.deleted(claim) or foreign(pod_view.cache_owner(claim), owner):
                await self.remove_claim(slot)
            elif owner is None:
                return
            else:
                with suppress(NotFound):
                    await self._mark(self._claims, CLAIMS, key, lambda doc: _owning(doc, owner))
                    return
        raise Conflict(f"the volume claim {key} is being changed by somebody else")

    async def _configure(self, slot: Slot, pool: Pool, toml: str) -> None:
        mark = (pool.uid, toml)
        if self._configured.get(_pool_of(slot)) == mark:
            return
        name = pod_spec.config_name(slot)
        with _admission("ConfigMap"):
            await self._api.apply(paths.core("configmaps", slot.namespace, name), pod_spec.config(slot, pool, toml))
        self._configured[_pool_of(slot)] = mark

    async def _create(self, reflector: Reflector, plural: str, doc: Doc) -> Doc | None:
        """Creates it; None: its name is taken, by what is then known of."""
        key = paths.key_of(doc)
        try:
            made = await self._api.create(paths.core(plural, key.namespace), doc)
        except Conflict:
            await self._read(reflector, plural, key)
            return None
        reflector.apply(made)
        return made

    async def _mark(self, reflector: Reflector, plural: str, key: Key, change: Callable[[Doc], Doc | None]) -> None:
        """Changes metadata, if nobody else has meanwhile; else looks again.

        Args:
            reflector: Has the object as it is known.
            plural: The kind.
            key: The object.
            change: What to change of a document's metadata; None: nothing. It may raise.
        """
        doc = reflector.get(key)
        for _ in range(_TRIES):
            doc = doc or await self._read(reflector, plural, key)
            metadata = change(doc)
            if metadata is None:
                return
            metadata["resourceVersion"] = doc["metadata"]["resourceVersion"]
            try:
                reflector.apply(await self._api.patch(paths.core(plural, *key), {"metadata": metadata}))
                return
            except Conflict:
                doc = None
        raise Conflict(f"{plural} {key}: it is being changed by somebody else all the time")

    async def _delete(self, reflector: Reflector, plural: str, doc: Doc, *, grace: int | None = None) -> None:
        """Asks for the end of exactly this one."""
        key = paths.key_of(doc)
        try:
            await self._api.delete(paths.core(plural, *key), uid=pod_view.uid(doc), grace=grace)
        except NotFound:
            return  # the watch reports it
        except Conflict:  # another one of this name
            with suppress(NotFound):
                await self._read(reflector, plural, key)

    async def _gone(self, reflector: Reflector, what: str, doc: Doc) -> None:
        key, uid = paths.key_of(doc), pod_view.uid(doc)
        try:
            async with asyncio.timeout(self._ending):
                await reflector.until(key, lambda current: current is None or pod_view.uid(current) != uid)
        except TimeoutError:
            node = doc["spec"].get("nodeName")
            held = ", ".join(doc["metadata"].get("finalizers") or ())
            raise WorkerFailed(
                f"the {what} {key} is being deleted, but is not gone after {self._ending:.0f} s",
                hint=f"Check its node {node}."
                if node
                else f"Check what holds it: {held or 'nothing that it names'}.",
            ) from None

    async def _read(self, reflector: Reflector, plural: str, key: Key) -> Doc:
        """Reads it from the cluster. Raises WorkerFailed if it is somebody else's, NotFound."""
        doc = await self._api.get(paths.core(plural, *key))
        reflector.apply(_ours(plural, key, doc))
        return doc


def _ours(what: str, key: Key, doc: Doc) -> Doc:
    if doc["metadata"].get("labels", {}).get(LABEL_MANAGED) != MANAGER:
        raise WorkerFailed(
            f"{what} {key}: there is one of this name that is not bkpool's",
            hint="Delete or rename it, or give the pool another name.",
        )
    return doc


def foreign(holder: str | None, owner: str | None) -> bool:
    """Whether a cache must be wiped before this owner (None: nobody yet) may use it."""
    return owner is not None and holder not in {None, owner}


def _owning(doc: Doc, owner: str) -> Doc | None:
    holder = pod_view.cache_owner(doc)
    if foreign(holder, owner):
        raise Conflict(
            f"the cache of {paths.key_of(doc)} belongs to another identity", hint="It must be wiped first."
        )
    return None if holder == owner else {"annotations": {ANNOTATION_CACHE_OWNER: owner}}


def _pool_of(slot: Slot) -> Key:
    return Key(slot.namespace, slot.pool)


@contextmanager
def _admission(what: str) -> Iterator[None]:
    try:
        yield
    except (InvalidInput, Forbidden) as error:
        raise pod_spec.refusal(error, what) from None
