"""Keeps every pool's gateway as pool_objects.py says, from whichever replica runs the controller.

Level-triggered: what a pool should have is applied where it differs from what was applied, or where the cluster says
that somebody has changed it. One pool's errors never stop another's. It never touches a worker.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType

import structlog

from bkpool.controller.pool_gateway_objects import (
    GatewayDefaults,
    endpoint_of,
    gateway_name,
    is_of_a_pool,
    node_address,
    outside_hosts,
    path_of,
    pool_objects,
    secret,
    service_type,
)
from bkpool.core.errors import BkpoolError, Conflict, Forbidden, Gone, InvalidInput, NotFound, Unavailable
from bkpool.core.names import LABEL_MANAGED, LABEL_POOL, LABEL_PURPOSE, MANAGER, PURPOSE_GATEWAY, Key
from bkpool.core.pool import Pool, ServiceType
from bkpool.kube import Doc, KubeApi, paths
from bkpool.pki.bundle import ClusterSecrets, bundle_fits, bundle_renew_at, gateway_bundle
from bkpool.pki.names import CertificateNames, gateway_names
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

_PAUSE, _LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=1)
_AT_ONCE = 4
"""Pools that are applied at the same time."""
_OURS = f"{LABEL_MANAGED}={MANAGER},{LABEL_PURPOSE}={PURPOSE_GATEWAY}"
_WATCHED = {"Service": ("v1", "services"), "Secret": ("v1", "secrets"), "Deployment": ("apps/v1", "deployments")}
"""Whose change by others is noticed at once; the rest is put right when the controller starts."""


@dataclass(slots=True)
class _Keeper:
    """One pool's gateway in memory."""

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    version: tuple[str, int | None] | None = None
    """Which pool, and which spec of it, was looked at last."""
    applied: dict[str, str] = field(default_factory=dict)
    """Digests of the documents that were applied, by path."""
    given: dict[str, str] = field(default_factory=dict)
    """Digests of what the cluster made of them."""
    service: Doc | None = None
    deployment: Doc | None = None
    bundle: dict[str, bytes] | None = None
    node: str | None = None


class PoolGateways:
    """Makes and keeps the gateways of all pools.

    Args:
        api: The cluster.
        mirror: Where the pools are.
        secrets: Who issues the gateways' certificates.
        image: bkpool's own image, which the gateways run.
        controller: The name of the appliance's Deployment.
        namespace: The namespace of the appliance.
        now: The clock.
        recorder: Is told of certificates that were changed.
    """

    def __init__(
        self,
        api: KubeApi,
        mirror: Mirror,
        secrets: ClusterSecrets,
        *,
        image: str,
        controller: str,
        namespace: str,
        now: Callable[[], datetime],
        recorder: Recorder,
    ) -> None:
        self._api = api
        self._mirror = mirror
        self._secrets = secrets
        self._setting = GatewayDefaults(image, namespace, controller)
        self._now = now
        self._recorder = recorder
        self._keepers: dict[Key, _Keeper] = {}
        self._watches: dict[str, list[asyncio.Task[None]]] = {}
        self._endpoints: dict[Key, str] = {}
        self._trouble: dict[Key, str] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._some = asyncio.Semaphore(_AT_ONCE)
        self.endpoints: Mapping[Key, str] = MappingProxyType(self._endpoints)
        """What callers of a pool are told; absent until its gateway has been applied."""
        self.trouble: Mapping[Key, str] = MappingProxyType(self._trouble)
        """Why a pool's gateway is not as it should be."""

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, in the event loop, whenever endpoints or trouble have changed; returns what ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def run(self) -> None:
        """Runs until cancelled. Run again, it looks at everything anew."""
        await self._mirror.ready.wait()
        unsubscribe = self._mirror.subscribe(self._changed)
        try:
            for key in tuple(self._mirror.pools):
                self._changed(key)
            await asyncio.Event().wait()
        finally:
            unsubscribe()
            ended = [keeper.task for keeper in self._keepers.values() if keeper.task]
            ended += [task for tasks in self._watches.values() for task in tasks]
            self._keepers.clear()
            self._watches.clear()
            for task in ended:
                task.cancel()
            await asyncio.gather(*ended, return_exceptions=True)

    def _changed(self, key: Key) -> None:
        """A pool, or one of its workers: only a pool's spec, its coming and its going are anything to do with us."""
        pool = self._mirror.pools.get(key)
        if pool is None or pool.metadata.deletion_timestamp is not None:
            self._let_go(key)
            return
        keeper = self._keepers.get(key)
        if keeper is None:
            keeper = self._keepers[key] = _Keeper()
            keeper.task = asyncio.create_task(self._keep(key, keeper))
            self._follow_all(key.namespace)
        elif keeper.version != _version(pool):
            keeper.wake.set()

    def _let_go(self, key: Key) -> None:
        """The pool is gone, and the cluster deletes what it owned."""
        keeper = self._keepers.pop(key, None)
        if keeper is not None and keeper.task is not None:
            keeper.task.cancel()
        if not any(other.namespace == key.namespace for other in self._keepers):
            for task in self._watches.pop(key.namespace, ()):
                task.cancel()
        self._tell(key, endpoint=None, trouble="")

    def _tell(self, key: Key, *, endpoint: str | None, trouble: str) -> None:
        before = self._endpoints.get(key), self._trouble.get(key)
        for told, value in ((self._endpoints, endpoint), (self._trouble, trouble)):
            if value:
                told[key] = value
            else:
                told.pop(key, None)
        if before != (self._endpoints.get(key), self._trouble.get(key)):
            for callback in self._callbacks:
                callback()

    # --- one pool ---------------------------------------------------------------------------------------------------

    async def _keep(self, key: Key, keeper: _Keeper) -> None:
        """Applies what the pool should have, again and again, whenever there is a reason to."""
        failures = 0
        while pool := self._mirror.pools.get(key):
            keeper.wake.clear()
            keeper.version = _version(pool)
            try:
                async with self._some:
                    due = await self._apply(pool, keeper)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one pool stays with it
                due = self._now() + min(_PAUSE * 2 ** min(failures, 10), _LONGEST_PAUSE)
                failures += 1
                self._failed(key, error)
            else:
                failures = 0
                host = endpoint_of(pool, keeper.service, keeper.node)
                self._tell(key, endpoint=host, trouble=_trouble_of(keeper.deployment))
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, (due - self._now()).total_seconds())):
                    await keeper.wake.wait()

    def _failed(self, key: Key, error: Exception) -> None:
        endpoint, before = self._endpoints.get(key), self._trouble.get(key, "")
        if isinstance(error, Unavailable):
            log.warning("pool.gateway_not_applied", pool=str(key), reason=error.message)
            return
        if not isinstance(error, BkpoolError):
            log.error("pool.gateway_crashed", pool=str(key), exc_info=error)
            trouble = "gateway: an internal error; the controller's log has it"
        else:
            trouble = f"gateway: {error.message}. {_hint(key, error)}".rstrip(". ") + "."
            if trouble != before:
                log.warning("pool.gateway_not_applied", pool=str(key), reason=error.message)
        self._tell(key, endpoint=endpoint, trouble=trouble)

    async def _apply(self, pool: Pool, keeper: _Keeper) -> datetime:
        """Brings the cluster to what this pool should have; returns when its certificates are due."""
        service, *others = pool_objects(pool, self._setting)
        keeper.service = await self._ensure(service, keeper) or keeper.service
        if service_type(pool) is ServiceType.NODE_PORT:
            keeper.node = node_address(await self._gateway_pods(pool), keeper.node)
        due = await self._ensure_certificates(pool, keeper)
        for doc in others:
            made = await self._ensure(doc, keeper)
            if made is not None and doc["kind"] == "Deployment":
                keeper.deployment = made
        return due

    async def _ensure(self, doc: Doc, keeper: _Keeper) -> Doc | None:
        """Applies a document, unless it is as it was applied; returns what the cluster made of it."""
        path, digest = path_of(doc), _digest(doc)
        if keeper.applied.get(path) == digest:
            return None
        if path not in keeper.applied:
            await self._refuse_foreign(path, doc)
        made = await self._api.apply(path, doc)
        keeper.applied[path], keeper.given[path] = digest, _state(made)
        return made

    async def _refuse_foreign(self, path: str, doc: Doc) -> None:
        """Raises Conflict where somebody else's object has the name: applying would take it from him."""
        try:
            live = await self._api.get(path)
        except NotFound:
            return
        if not is_of_a_pool(live):
            name = f"{doc['kind']} {doc['metadata']['namespace']}/{doc['metadata']['name']}"
            raise Conflict(f"{name} is somebody else's", hint="Give the pool another name, or delete that object.")

    async def _gateway_pods(self, pool: Pool) -> Sequence[Doc]:
        selector = f"{LABEL_POOL}={pool.key.name},{LABEL_PURPOSE}={PURPOSE_GATEWAY}"
        items, _ = await self._api.list(paths.core("pods", pool.key.namespace), labelSelector=selector)
        return items

    async def _ensure_certificates(self, pool: Pool, keeper: _Keeper) -> datetime:
        """Issues the gateway's certificates where there are none that can be used."""
        names = _names(pool, outside_hosts(pool, keeper.service, keeper.node))
        found = keeper.bundle if keeper.bundle is not None else await self._stored_bundle(pool)
        if not bundle_fits(found, self._secrets, names, self._now()):
            name = f"{gateway_name(pool)}.{pool.key.namespace}"
            if found:
                self._recorder.record(pool, "CertificateRotated", "the gateway's certificates are issued anew")
            found = gateway_bundle(self._secrets, names, name, self._now())
            log.info("pool.gateway_certificate_issued", pool=str(pool.key), names=[*names.dns, *map(str, names.ips)])
        encoded = {key: base64.b64encode(value).decode() for key, value in found.items()}
        await self._ensure(secret(pool, encoded), keeper)
        keeper.bundle = found
        return bundle_renew_at(found)

    async def _stored_bundle(self, pool: Pool) -> dict[str, bytes]:
        try:
            doc = await self._api.get(paths.core("secrets", pool.key.namespace, gateway_name(pool)))
        except NotFound:
            return {}
        try:
            return {key: base64.b64decode(value) for key, value in (doc.get("data") or {}).items()}
        except binascii.Error:
            return {}

    # --- the cluster's side -----------------------------------------------------------------------------------------

    def _follow_all(self, namespace: str) -> None:
        if namespace not in self._watches:
            self._watches[namespace] = [asyncio.create_task(self._follow(namespace, kind)) for kind in _WATCHED]

    async def _follow(self, namespace: str, kind: str) -> None:
        """Notices what becomes of the objects of one kind that we made in one namespace."""
        api_version, plural = _WATCHED[kind]
        path = paths.core(plural, namespace) if api_version == "v1" else paths.group(api_version, plural, namespace)
        failures = 0
        while True:
            try:
                items, since = await self._api.list(path, labelSelector=_OURS)
                self._missed(namespace, plural, {item["metadata"]["name"] for item in items})
                for item in items:
                    self._noticed({**item, "kind": kind}, gone=False)
                failures = 0
                async with aclosing(self._api.watch(path, since, labelSelector=_OURS)) as events:
                    async for event in events:
                        if event["type"] != "BOOKMARK":
                            self._noticed({**event["object"], "kind": kind}, gone=event["type"] == "DELETED")
            except Gone:
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, not watching for good would be worse
                pause = min(_PAUSE * 2 ** min(failures, 10), _LONGEST_PAUSE)
                failures += 1
                log.warning("pool.gateways_not_watched", namespace=namespace, kind=kind, reason=str(error))
                await asyncio.sleep(pause.total_seconds())

    def _missed(self, namespace: str, plural: str, there: set[str]) -> None:
        """Has made anew what was deleted while nobody looked."""
        for key, keeper in self._keepers.items():
            if key.namespace != namespace:
                continue
            for path in [path for path in keeper.applied if f"/{plural}/" in path]:
                if path.rsplit("/", 1)[1] not in there:
                    self._lost(keeper, path)

    def _noticed(self, doc: Doc, *, gone: bool) -> None:
        metadata = doc["metadata"]
        key = Key(metadata["namespace"], metadata.get("labels", {}).get(LABEL_POOL, ""))
        keeper, pool = self._keepers.get(key), self._mirror.pools.get(key)
        if keeper is None or pool is None:
            return
        api_version, _ = _WATCHED[doc["kind"]]
        path = path_of({**doc, "apiVersion": api_version})
        if gone or ("deletionTimestamp" not in metadata and keeper.given.get(path, _state(doc)) != _state(doc)):
            self._lost(keeper, path)
        if gone:
            return
        match doc["kind"]:
            case "Service":
                moved = keeper.service is None or keeper.service.get("status") != doc.get("status")
                keeper.service = doc
            case "Deployment":
                moved = keeper.deployment is None or keeper.deployment.get("status") != doc.get("status")
                keeper.deployment = doc
            case _:
                moved = False
        if moved:
            keeper.wake.set()

    def _lost(self, keeper: _Keeper, path: str) -> None:
        """Somebody has changed or deleted what we applied there: it is applied again."""
        keeper.applied.pop(path, None)
        keeper.given.pop(path, None)
        if "/secrets/" in path:
            keeper.bundle = None
        keeper.wake.set()


def _version(pool: Pool) -> tuple[str, int | None]:
    return pool.uid, pool.metadata.generation


def _hint(key: Key, error: BkpoolError) -> str:
    if isinstance(error, Forbidden):
        return f"Apply `bkpool manifests` with --pool-namespace {key.namespace} beside your other options."
    return error.hint


def _names(pool: Pool, hosts: Sequence[str]) -> CertificateNames:
    try:
        return gateway_names("localhost", [pool.key], hosts)
    except InvalidInput as error:
        field = "spec.networking.external.hostname"
        told = error.message.replace(error.field or "", field)
        raise InvalidInput(told, hint=error.hint, field=field) from None


def _trouble_of(deployment: Doc | None) -> str:
    """Why the gateway's pods do not come up, where the cluster says so."""
    conditions = (deployment or {}).get("status", {}).get("conditions", ())
    bad = {("ReplicaFailure", "True"), ("Progressing", "False")}
    found = next((told for told in conditions if (told["type"], told["status"]) in bad), None)
    if deployment is None or found is None:
        return ""
    look = f"kubectl -n {deployment['metadata']['namespace']} describe pods -l {LABEL_PURPOSE}={PURPOSE_GATEWAY}"
    return f"gateway: {found.get('message') or found.get('reason')} See: {look}"


def _state(doc: Doc) -> str:
    """What of an object in the cluster is ours to keep."""
    return _digest({part: doc.get(part) for part in ("spec", "data")})


def _digest(doc: Doc) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()
