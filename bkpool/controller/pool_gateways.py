"""Keeps the gateway of every pool in the cluster as pool_gateway_objects.py describes it.

It runs in the replica that is the controller, and is level-triggered: an object is applied where it differs from what
was applied last, or where it was changed or deleted by others. An error of one pool never stops another. It never
touches a worker.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType

import structlog

from bkpool.controller.gateway_certificates import GatewayCertificates, WorkerAuthorities
from bkpool.controller.gateway_rights import RIGHTS, GatewayRights
from bkpool.controller.pool_documents import gateway_name, is_of_a_pool, path_of
from bkpool.controller.pool_gateway_objects import GatewayDefaults, pool_objects, secret
from bkpool.controller.pool_gateway_state import GatewayState, content_digest, digest_of, trouble_of
from bkpool.controller.pool_hosts import certificate_names, reachable_hosts
from bkpool.controller.pool_service import endpoint_of, node_address, service_type
from bkpool.core.allowances import Allowances, host_refusals, permitted, service_refusals
from bkpool.core.backoff import Backoff
from bkpool.core.errors import BkpoolError, Conflict, Forbidden, NotFound, Unavailable
from bkpool.core.names import LABEL_MANAGED, LABEL_POOL, LABEL_PURPOSE, MANAGER, PURPOSE_GATEWAY, Key, Slot
from bkpool.core.pool import Pool, ServiceType
from bkpool.core.subscribers import Subscribers
from bkpool.core.wall_clock import pause_until
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.reflector import Change, KubeCollection, Reflector
from bkpool.pki.authority import SERVER_LIFE, Authority
from bkpool.pki.bundle import FORMER_DIALLER_CERT, SERVER_ENTRIES, TLS_CERT, bundle_renew_at
from bkpool.pki.rotation import Former, Rotation
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror, MirrorChange

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds until a pool whose gateway could not be applied is tried again; the longest also for a watch."""
_CONCURRENCY = 4
"""Pools that are applied at the same time."""
_SELECTOR = f"{LABEL_MANAGED}={MANAGER},{LABEL_PURPOSE}={PURPOSE_GATEWAY}"
_WATCHED = {
    "Service": KubeCollection("v1", "services", _SELECTOR),
    "Secret": KubeCollection("v1", "secrets", _SELECTOR),
    "Deployment": KubeCollection("apps/v1", "deployments", _SELECTOR),
}
"""Changes of these by others are noticed at once. The other kinds are repaired when the controller starts."""
_WITH_STATUS = ("Service", "Deployment")
"""The kinds whose status becomes the pool's endpoint and trouble."""


class PoolGateways:
    """Makes and keeps the gateways of all pools.

    Args:
        api: The cluster.
        mirror: Has the pools.
        authority: Issues the gateways' certificates for clients.
        workers: Issue those for workers.
        image: bkpool's own image, which the gateways run.
        controller: The name of the appliance's Deployment.
        namespace: The namespace of the appliance.
        now: The clock.
        recorder: Records that certificates were replaced.
        gateway_variables: Environment variables of the gateways: the settings that are not the default.
        server_life: How long a certificate of a gateway is valid.
        allowed: What pools may ask for.
        former: What there was before the last rotation of the CA.
    """

    def __init__(
        self,
        api: KubeApi,
        mirror: Mirror,
        authority: Authority,
        workers: WorkerAuthorities,
        *,
        image: str,
        controller: str,
        namespace: str,
        now: Callable[[], datetime],
        recorder: Recorder,
        gateway_variables: Mapping[str, str] = MappingProxyType({}),
        server_life: timedelta = SERVER_LIFE,
        allowed: Allowances = Allowances(),  # noqa: B008 - immutable
        former: Former | None = None,
    ) -> None:
        self._api = api
        self._mirror = mirror
        rotation = Rotation(authority, former, now)
        self._certificates = GatewayCertificates(rotation, mirror.all_workers, workers, server_life)
        self._overlapped = former is not None
        self._defaults = GatewayDefaults(image, namespace, controller, gateway_variables)
        self._allowed = allowed
        self._now = now
        self._recorder = recorder
        self._states: dict[Key, GatewayState] = {}
        self._rights = GatewayRights(mirror, self._states, self._objects, self._ensure)
        self._reflectors: dict[str, dict[str, Reflector]] = {}
        """By namespace and kind."""
        self._watches: dict[str, list[asyncio.Task[None]]] = {}
        self._endpoints: dict[Key, str] = {}
        self._trouble: dict[Key, str] = {}
        self._subscribers: Subscribers[[Key]] = Subscribers()
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self.endpoints: Mapping[Key, str] = MappingProxyType(self._endpoints)
        """The endpoint that callers of a pool get. It is missing until the gateway has been applied."""
        self.trouble: Mapping[Key, str] = MappingProxyType(self._trouble)
        """Why a pool's gateway is not as it should be."""

    def on_change(self, callback: Callable[[Key], None]) -> Callable[[], None]:
        """Calls back with a pool, in the event loop, when its `endpoints` or `trouble` have changed.

        Returns:
            A function that unsubscribes.
        """
        return self._subscribers.add(callback)

    async def run(self) -> None:
        """Runs until cancelled. When it is run again, it begins without any knowledge of the cluster."""
        await self._mirror.ready.wait()
        await self._mirror.heartbeats.until_known()  # so that no gateway loses a right for a moment
        subscriptions = ExitStack()
        subscriptions.callback(self._mirror.heartbeats.on_followed(self._rights.look_again))
        subscriptions.callback(self._mirror.heartbeats.on_followed(self._apply_all))
        subscriptions.callback(self._mirror.subscribe(self._on_change))
        subscriptions.callback(self._certificates.workers.on_change(self._worker_changed))
        try:
            for key in tuple(self._mirror.pools):
                self._pool_changed(key)
            self._rights.look_again()
            await self._rights.run()
        finally:
            subscriptions.close()
            tasks = [state.task for state in self._states.values() if state.task]
            tasks += [task for watches in self._watches.values() for task in watches]
            self._states.clear()
            self._watches.clear()
            self._reflectors.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _on_change(self, change: MirrorChange) -> None:
        """Follows pools. Of workers it only matters whether one still has a lease of the time before a rotation."""
        if self._overlapped and not self._certificates.overlaps():
            self._overlapped = False
            self._apply_all()
        if change.slot is None:
            self._pool_changed(change.pool)

    def _apply_all(self) -> None:
        for state in self._states.values():
            state.wake.set()

    def _pool_changed(self, key: Key) -> None:
        """Follows a pool's creation, deletion and spec."""
        pool = self._mirror.pools.get(key)
        if pool is None or pool.metadata.deletion_timestamp is not None:
            self._forget(key)
            return
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = GatewayState()
            self._watch(key.namespace)
            state.task = asyncio.create_task(self._keep(key, state))
        elif state.version != pool.spec_version:
            state.wake.set()

    def _worker_changed(self, slot: Slot) -> None:
        """Takes the certificates for workers of a former CA away from a gateway when the last such worker is gone."""
        key = Key(slot.namespace, slot.pool)
        state = self._states.get(key)
        if state is None or FORMER_DIALLER_CERT not in (state.bundle or ()):
            return
        if not self._certificates.workers.former_authority(key):
            state.wake.set()

    def _forget(self, key: Key) -> None:
        """Stops work for a pool that was deleted. The cluster deletes the objects that it owned."""
        state = self._states.pop(key, None)
        if state is not None and state.task is not None:
            state.task.cancel()
        if not any(other.namespace == key.namespace for other in self._states):
            self._reflectors.pop(key.namespace, None)
            for task in self._watches.pop(key.namespace, ()):
                task.cancel()
        self._publish(key, endpoint=None, trouble="")

    def _publish(self, key: Key, *, endpoint: str | None, trouble: str) -> None:
        before = self._endpoints.get(key), self._trouble.get(key)
        for published, value in ((self._endpoints, endpoint), (self._trouble, trouble)):
            if value:
                published[key] = value
            else:
                published.pop(key, None)
        if before != (self._endpoints.get(key), self._trouble.get(key)):
            self._subscribers.notify(key)

    # --- one pool ---------------------------------------------------------------------------------------------------

    async def _keep(self, key: Key, state: GatewayState) -> None:
        """Applies the pool's objects again and again, whenever there is a reason to."""
        backoff = Backoff(_LONGEST_PAUSE, first=_FIRST_PAUSE)
        while pool := self._mirror.pools.get(key):
            state.wake.clear()
            state.version = pool.spec_version
            try:
                async with self._slots:
                    with suppress(BkpoolError):  # it is applied once more in its place, and an error is told there
                        await self._rights.apply(pool, state)
                    due = await self._apply(pool, state)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one pool must not stop the others
                self._report_failure(key, error)
                await self._pause(state, backoff.failed())
            else:
                backoff.succeeded()
                live, certificate = state.objects.get("Service"), (state.bundle or {}).get(TLS_CERT, b"")
                endpoint = endpoint_of(pool, live, reachable_hosts(pool, live, state.node, certificate))
                self._publish(key, endpoint=endpoint, trouble=trouble_of(state.objects.get("Deployment")))
                while not state.wake.is_set() and (now := self._now()) < due:
                    await self._pause(state, pause_until(due, now))

    async def _pause(self, state: GatewayState, seconds: float) -> None:
        """Waits, unless there is a reason to apply the pool's objects again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await state.wake.wait()

    def _report_failure(self, key: Key, error: Exception) -> None:
        endpoint, before = self._endpoints.get(key), self._trouble.get(key, "")
        if isinstance(error, Unavailable):
            log.warning("pool.gateway_not_applied", pool=str(key), reason=error.message)
            return
        if not isinstance(error, BkpoolError):
            log.error("pool.gateway_crashed", pool=str(key), exc_info=error)
            trouble = "gateway: an internal error; see the controller's log"
        else:
            trouble = f"gateway: {error.message}. {_hint(key, error)}".rstrip(". ") + "."
            if trouble != before:
                log.warning("pool.gateway_not_applied", pool=str(key), reason=error.message)
        self._publish(key, endpoint=endpoint, trouble=trouble)

    async def _apply(self, pool: Pool, state: GatewayState) -> datetime:
        """Brings the cluster to what this pool should have; returns when its certificates are due for renewal.

        What the operator has not allowed is left out. A Service and certificates that are there already stay as they
        are as long as the pool asks for more than is allowed of them, so that an upgrade cuts nobody off.
        """
        wanted = permitted(pool, self._allowed)
        service, *others = self._objects(pool)
        if not (service_refusals(pool, self._allowed) and await self._has_service(service, state)):
            await self._ensure(service, state)
        if service_type(wanted) is ServiceType.NODE_PORT:
            state.node = node_address(await self._gateway_pods(pool), state.node)
        due = await self._ensure_certificates(pool, state)
        await self._rights.apply(pool, state)
        for doc in others:
            if doc["kind"] not in RIGHTS:
                await self._ensure(doc, state)
        return due

    def _objects(self, pool: Pool) -> list[Doc]:
        defaults = replace(self._defaults, heartbeats=self._mirror.heartbeats.followed_in(pool.key.namespace))
        return pool_objects(permitted(pool, self._allowed), defaults)

    async def _has_service(self, service: Doc, state: GatewayState) -> bool:
        """Whether the pool has a Service. Raises Conflict if another program has made it."""
        if "Service" not in state.objects:
            try:
                state.objects["Service"] = await self._api.get(path_of(service))
            except NotFound:
                return False
            _refuse_foreign(service, state.objects["Service"])
        return True

    async def _ensure(self, doc: Doc, state: GatewayState) -> None:
        """Applies a document, unless it is as it was applied last."""
        path, digest, kind = path_of(doc), digest_of(doc), doc["kind"]
        if state.applied.get(path) == digest:
            return
        if path not in state.applied:
            with suppress(NotFound):
                _refuse_foreign(doc, await self._api.get(path))  # applying would take it over
        state.applied.pop(path, None)  # if the answer is lost, nobody knows how the object is
        made = await self._api.apply(path, doc)
        state.applied[path], state.made[path] = digest, content_digest(made)
        if kind in _WATCHED:
            state.objects[kind] = made
            if (reflectors := self._reflectors.get(doc["metadata"]["namespace"])) is not None:
                reflectors[kind].apply(made)  # so that a later list can say that it was deleted

    async def _gateway_pods(self, pool: Pool) -> Sequence[Doc]:
        selector = f"{LABEL_POOL}={pool.key.name},{LABEL_PURPOSE}={PURPOSE_GATEWAY}"
        items, _ = await self._api.list(paths.core("pods", pool.key.namespace), labelSelector=selector)
        return items

    async def _ensure_certificates(self, pool: Pool, state: GatewayState) -> datetime:
        """Issues the gateway's certificates where the stored ones cannot be used; returns when they are due."""
        names = certificate_names(pool, self._allowed, state.objects.get("Service"), state.node)
        refused = host_refusals(pool, self._allowed) or service_refusals(pool, self._allowed)
        found = state.bundle if state.bundle is not None else await self._stored_bundle(pool)
        server = {name: found[name] for name in SERVER_ENTRIES if name in found}
        if not self._certificates.server_fits(found, None if refused else names, self._now()):
            if found:
                self._recorder.record(pool, "CertificateRotated", "the gateway's certificates are issued again")
            server = self._certificates.server(names, self._now())
            log.info("pool.gateway_certificate_issued", pool=str(pool.key), names=[*names.dns, *map(str, names.ips)])
        gateway = f"{gateway_name(pool)}.{pool.key.namespace}"
        found = self._certificates.with_diallers(found, server, pool.key, gateway, self._now())
        encoded = {key: base64.b64encode(value).decode() for key, value in found.items()}
        await self._ensure(secret(pool, encoded), state)
        state.bundle = found
        due, next_check = bundle_renew_at(found), self._certificates.rotation.next_check
        return due if next_check is None else min(due, next_check)

    async def _stored_bundle(self, pool: Pool) -> dict[str, bytes]:
        try:
            doc = await self._api.get(paths.core("secrets", pool.key.namespace, gateway_name(pool)))
        except NotFound:
            return {}
        try:
            return {key: base64.b64decode(value) for key, value in (doc.get("data") or {}).items()}
        except binascii.Error:
            return {}

    # --- what others do to the objects ------------------------------------------------------------------------------

    def _watch(self, namespace: str) -> None:
        """Starts to follow the gateways' objects in a namespace, unless that runs already."""
        if namespace in self._reflectors:
            return
        reflectors = {
            kind: Reflector(
                self._api,
                collection,
                partial(self._object_changed, kind),
                namespaces=[namespace],
                longest_pause=_LONGEST_PAUSE,
            )
            for kind, collection in _WATCHED.items()
        }
        self._reflectors[namespace] = reflectors
        self._watches[namespace] = [asyncio.create_task(reflector.run()) for reflector in reflectors.values()]

    def _object_changed(self, kind: str, change: Change) -> None:
        """Schedules another apply if others have changed or deleted the object, and stores its status."""
        metadata = change.doc["metadata"]
        state = self._states.get(Key(change.key.namespace, metadata.get("labels", {}).get(LABEL_POOL, "")))
        if state is None:
            return
        path = f"{_WATCHED[kind].path(change.key.namespace)}/{change.key.name}"
        content = content_digest(change.doc)
        differs = "deletionTimestamp" not in metadata and state.made.get(path, content) != content
        if change.deleted or differs:
            state.applied.pop(path, None)
            state.made.pop(path, None)
            if kind == "Secret":
                state.bundle = None
            state.wake.set()
        if change.deleted:
            return
        before = state.objects.get(kind)
        state.objects[kind] = change.doc
        if kind in _WITH_STATUS and (before is None or before.get("status") != change.doc.get("status")):
            state.wake.set()


def _refuse_foreign(doc: Doc, existing: Doc) -> None:
    """Raises Conflict if an existing object with the name of this document is not bkpool's."""
    if not is_of_a_pool(existing):
        name = f"{doc['kind']} {doc['metadata']['namespace']}/{doc['metadata']['name']}"
        raise Conflict(
            f"{name} exists and was not made by bkpool", hint="Give the pool another name, or delete that object."
        )


def _hint(key: Key, error: BkpoolError) -> str:
    if isinstance(error, Forbidden):
        return f"Apply `bkpool manifests` with --pool-namespace {key.namespace} beside your other options."
    return error.hint
