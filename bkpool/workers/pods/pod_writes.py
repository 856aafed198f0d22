"""Creates, marks and deletes the objects of workers in a cluster.

The order of the writes matters: a cache has its owner before a pod can use it, a pod is gone before its volume is
deleted, and both are gone before those of another owner are created. After a crash between two writes the next start
completes them. Nothing here decides whether or when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime

from bkpool.core.cache_owner import belongs_to_another, history_ends_with_lease, must_be_wiped
from bkpool.core.errors import Conflict, Forbidden, InvalidInput, NotFound, WorkerFailed
from bkpool.core.names import (
    ANNOTATION_CACHE_OWNER,
    ANNOTATION_HISTORY,
    ANNOTATION_SPEC_DIGEST,
    HISTORY_OLD,
    LABEL_MANAGED,
    MANAGER,
    Key,
    Slot,
)
from bkpool.core.pool import CacheGC, LocalCache, Pool, PoolSpec
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.reflector import Reflector
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.config import not_taken, render
from bkpool.workers.pods import pod_spec, pod_view
from bkpool.workers.pods.egress import egress_key, egress_policy

PODS, CLAIMS = "pods", "persistentvolumeclaims"
_GRACE = 5  # seconds for buildkitd to end: no build runs any more
_TRIES = 5  # of a compare-and-swap: a kubelet writes the status of a new pod a few times a second


class PodWrites:
    """Writes to one cluster.

    Args:
        api: The cluster.
        authorities: Issue the workers' certificates.
        pods: The pods of workers.
        claims: The volume claims of workers.
        now: The clock.
        deletion_timeout: Seconds until an object that is being deleted must be gone.
        gc_defaults: For pools whose spec says nothing about collection (`workers.config`).
    """

    def __init__(
        self,
        api: KubeApi,
        authorities: PoolAuthorities,
        *,
        pods: Reflector,
        claims: Reflector,
        now: Callable[[], datetime],
        deletion_timeout: float,
        gc_defaults: CacheGC,
    ) -> None:
        self._api = api
        self._authorities = authorities
        self._pods = pods
        self._claims = claims
        self._now = now
        self._deletion_timeout = deletion_timeout
        self._gc_defaults = gc_defaults
        self._configured: dict[Key, tuple[str, str]] = {}
        """What was last written to each pool's ConfigMap: the pool's uid, and the text."""
        self._without_policy: dict[Key, str] = {}
        """Pools that have no egress policy, as is known: the key that it would have, and the pool's uid."""

    def ignored_config(self, spec: PoolSpec) -> list[str]:
        """What the ConfigMap of a pool does not take from the pool's own buildkitd.toml."""
        return not_taken(spec, self._gc_defaults)

    def digest(self, pool: Pool, image: str) -> str:
        """The digest of what of a pool's spec a pod is made with today.

        Args:
            pool: The pool.
            image: Used if the pool names none.

        Raises:
            WorkerFailed: The pool asks for what is not possible.
        """
        return pod_spec.pod_digest(pool, image, render(pool.spec, self._gc_defaults))

    async def make(self, request: pod_spec.PodRequest) -> Doc | None:
        """Creates a pod with everything that it needs.

        Returns:
            The pod; None: there was one already, and it is known from now on.

        Raises:
            WorkerFailed: The pool asks for what the cluster does not admit; the message names the field.
        """
        slot, pool = request.slot, request.pool
        authority = self._authorities.current(pool.key)
        request = replace(request, authority=authority.mark)
        # These may raise, so before the first write.
        pod, toml = pod_spec.pod(request), render(pool.spec, self._gc_defaults)
        pod["metadata"]["annotations"][ANNOTATION_SPEC_DIGEST] = pod_spec.pod_digest(pool, request.image, toml)
        if pod_spec.has_user_namespace(pod):
            await self._require_user_namespaces(pod)
        if (local := pool.spec.local_cache) is not None:
            await self._ensure_claim(slot, pool, local, request.owner)
            claim = self._claims.get(slot.worker)
            if claim is not None and history_ends_with_lease(pod_view.cache_owner(claim), pool.uid):
                pod["metadata"]["annotations"][ANNOTATION_HISTORY] = HISTORY_OLD
        await self.apply_egress(pool)
        await self._write_config(slot, pool, toml)
        leaf = authority.issue_worker(request.worker_uid, self._now())
        secret = pod_spec.secret(slot, pool, leaf, authority.cert_pem)
        with _admission("Secret"):
            await self._api.apply(paths.core("secrets", *slot.worker), secret)
        with _admission("pod"):
            return await self._create(self._pods, PODS, pod)

    async def apply_egress(self, pool: Pool) -> None:
        """Writes the NetworkPolicy that lets the pool's workers reach what its spec allows, and nothing else.

        Raises:
            WorkerFailed: The cluster does not admit it, or another program's policy has its name.
        """
        key, policy = egress_key(pool), egress_policy(pool)
        if policy is None and self._without_policy.get(key) == pool.uid:
            return
        path = paths.group("networking.k8s.io/v1", "networkpolicies", *key)
        self._without_policy.pop(key, None)
        with _admission("NetworkPolicy"):
            try:
                live = _ours("NetworkPolicy", key, await self._api.get(path))
            except NotFound:
                live = None
            if policy is not None:  # every time, because nothing reports its removal
                await self._api.apply(path, policy)
                return
            if live is not None:
                with suppress(NotFound):
                    await self._api.delete(path, uid=pod_view.uid(live))
        self._without_policy[key] = pool.uid

    async def own(self, pod: Doc, owner: str) -> None:
        """Writes who owns the cache, and that the worker is leased.

        Raises:
            Conflict: The cache has another owner, or another pod has this name by now.
            NotFound: The pod is gone.
        """
        claim = pod_view.claim_of(pod)
        if claim is not None:
            await self._mark(self._claims, CLAIMS, claim, lambda doc: _owner_change(doc, owner))

        def change(current: Doc) -> Doc | None:
            if pod_view.uid(current) != pod_view.uid(pod):
                raise Conflict(f"the pod {claim or paths.key_of(pod)} is another one by now")
            new_owner = None if claim else _owner_change(current, owner)
            if new_owner is None and pod_view.protected(current):
                return None
            metadata = pod_spec.protection(held=True)
            metadata["annotations"] |= (new_owner or {}).get("annotations", {})
            return metadata

        await self._mark(self._pods, PODS, paths.key_of(pod), change)

    async def protect(self, pod: Doc, *, held: bool) -> None:
        """Asks others to leave the pod alone while its worker is leased.

        Raises:
            NotFound: The pod is gone.
        """
        await self._mark(
            self._pods,
            PODS,
            paths.key_of(pod),
            lambda current: None if pod_view.protected(current) is held else pod_spec.protection(held=held),
        )

    async def note_history_cleared(self, pod: Doc) -> None:
        """Writes that the history in the pod's volume may be read by its next holder.

        Raises:
            NotFound: The pod is gone.
        """
        metadata = {"annotations": {ANNOTATION_HISTORY: None}}
        await self._mark(
            self._pods,
            PODS,
            paths.key_of(pod),
            lambda current: metadata if pod_view.has_old_history(current) else None,
        )

    async def end(self, slot: Slot, *, hurry: bool = True, grace: int = _GRACE) -> None:
        """Ends the pod in a slot and waits until it is gone.

        Args:
            slot: Which slot.
            grace: Seconds until it is killed; used only with `hurry`.
            hurry: It must end within seconds, without waiting for builds. A kubelet ignores that once the pod's hook
                waits for its connections to end (seen with 1.34).

        Raises:
            WorkerFailed: It is not gone in time.
        """
        while (pod := self._pods.get(slot.worker)) is not None:
            if hurry or not pod_view.deleted(pod):
                await self._delete(self._pods, PODS, pod, grace=grace if hurry else None)
            await self._wait_until_gone(self._pods, "pod", pod)

    async def discard(self, pod: Doc) -> None:
        """Deletes a pod that has not started, without waiting for its end."""
        slot = pod_view.slot_in(pod)
        if slot is not None:
            self._configured.pop(_pool_of(slot), None)  # its text may be what was wrong, so it is written again
        await self._delete(self._pods, PODS, pod, grace=_GRACE)

    async def retire(self, pod: Doc) -> None:
        """Deletes a pod that another one should replace. Builds that run in it may end first. Returns at once."""
        if not pod_view.deleted(pod):
            await self._delete(self._pods, PODS, pod)

    async def remove_secret(self, slot: Slot) -> None:
        """Deletes the worker's key."""
        with suppress(NotFound):
            await self._api.delete(paths.core("secrets", *slot.worker))

    async def remove_claim(self, slot: Slot) -> None:
        """Deletes the cache of a slot without a pod, and waits until it is gone.

        Raises:
            WorkerFailed: It is not gone in time.
        """
        while (claim := self._claims.get(slot.worker)) is not None:
            if not pod_view.deleted(claim):
                await self._delete(self._claims, CLAIMS, claim)
            await self._wait_until_gone(self._claims, "volume claim", claim)

    # --- parts of these ---------------------------------------------------------------------------------------------

    async def _ensure_claim(self, slot: Slot, pool: Pool, local: LocalCache, owner: str | None) -> None:
        """Makes sure that the slot has a volume claim that nobody else has used."""
        key = slot.worker
        for _ in range(_TRIES):
            claim = self._claims.get(key)
            if claim is None:
                new = pod_spec.volume(slot, pool, local, owner)
                with _admission("volume claim"):
                    if await self._create(self._claims, CLAIMS, new) is not None:
                        return
            elif pod_view.deleted(claim) or must_be_wiped(pod_view.cache_owner(claim), owner):
                await self.remove_claim(slot)
            elif owner is None:
                return
            else:
                with suppress(NotFound):
                    await self._mark(self._claims, CLAIMS, key, lambda doc: _owner_change(doc, owner))
                    return
        raise Conflict(f"the volume claim {key} is being changed by another program")

    async def _write_config(self, slot: Slot, pool: Pool, toml: str) -> None:
        mark = (pool.uid, toml)
        if self._configured.get(_pool_of(slot)) == mark:
            return
        name = pod_spec.config_name(slot)
        with _admission("ConfigMap"):
            await self._api.apply(paths.core("configmaps", slot.namespace, name), pod_spec.config(slot, pool, toml))
        self._configured[_pool_of(slot)] = mark

    async def _require_user_namespaces(self, pod: Doc) -> None:
        """Asks the API server whether it keeps `hostUsers`, and makes no pod.

        A server without the feature drops the field without a word. The pod would then be root on its node.

        Raises:
            WorkerFailed: It drops the field, or it does not admit the pod.
        """
        with _admission("pod"):
            try:
                kept = await self._api.create(paths.core(PODS, paths.key_of(pod).namespace), pod, dryRun="All")
            except Conflict:
                return  # there is a pod already, so none is made
        if not pod_spec.has_user_namespace(kept):
            raise pod_spec.no_user_namespaces()

    async def _create(self, reflector: Reflector, plural: str, doc: Doc) -> Doc | None:
        """Creates an object. Returns None if its name is taken; then the existing object is known."""
        key = paths.key_of(doc)
        try:
            made = await self._api.create(paths.core(plural, key.namespace), doc)
        except Conflict:
            await self._read(reflector, plural, key)
            return None
        reflector.apply(made)
        return made

    async def _mark(self, reflector: Reflector, plural: str, key: Key, change: Callable[[Doc], Doc | None]) -> None:
        """Changes metadata by compare-and-swap, and reads the object again after a conflict.

        Args:
            reflector: Has the object as it is known.
            plural: The kind.
            key: The object.
            change: Returns what to change in a document's metadata; None: nothing. It may raise.
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
        raise Conflict(f"{plural} {key}: it is being changed by another program all the time")

    async def _delete(self, reflector: Reflector, plural: str, doc: Doc, *, grace: int | None = None) -> None:
        """Deletes exactly this object, not a later one of the same name."""
        key = paths.key_of(doc)
        try:
            await self._api.delete(paths.core(plural, *key), uid=pod_view.uid(doc), grace=grace)
        except NotFound:
            return  # the watch reports it
        except Conflict:  # another object has this name
            with suppress(NotFound):
                await self._read(reflector, plural, key)

    async def _wait_until_gone(self, reflector: Reflector, what: str, doc: Doc) -> None:
        key, uid = paths.key_of(doc), pod_view.uid(doc)
        try:
            async with asyncio.timeout(self._deletion_timeout):
                await reflector.until(key, lambda current: current is None or pod_view.uid(current) != uid)
        except TimeoutError:
            node = doc["spec"].get("nodeName")
            held = ", ".join(doc["metadata"].get("finalizers") or ())
            raise WorkerFailed(
                f"the {what} {key} is being deleted, but is not gone after {self._deletion_timeout:.0f} s",
                hint=f"Check its node {node}."
                if node
                else f"Check what blocks its deletion: {held or 'it names no finalizer'}.",
            ) from None

    async def _read(self, reflector: Reflector, plural: str, key: Key) -> Doc:
        """Reads an object from the cluster.

        Raises:
            WorkerFailed: It is not bkpool's.
            NotFound: There is none.
        """
        doc = await self._api.get(paths.core(plural, *key))
        reflector.apply(_ours(plural, key, doc))
        return doc


def _ours(what: str, key: Key, doc: Doc) -> Doc:
    if doc["metadata"].get("labels", {}).get(LABEL_MANAGED) != MANAGER:
        raise WorkerFailed(
            f"{what} {key}: another object has this name, and it is not bkpool's",
            hint="Delete or rename it, or give the pool another name.",
        )
    return doc


def _owner_change(doc: Doc, owner: str) -> Doc | None:
    """The change of metadata that gives a cache its owner; None if they have it. Raises Conflict."""
    holder = pod_view.cache_owner(doc)
    if must_be_wiped(holder, owner):
        raise belongs_to_another(str(paths.key_of(doc)))
    return None if holder == owner else {"annotations": {ANNOTATION_CACHE_OWNER: owner}}


def _pool_of(slot: Slot) -> Key:
    return Key(slot.namespace, slot.pool)


@contextmanager
def _admission(what: str) -> Iterator[None]:
    try:
        yield
    except (InvalidInput, Forbidden) as error:
        raise pod_spec.refusal(error, what) from None
