"""Replaces the CAs of an appliance by new ones, at its operator's request, and tells how far the last rotation is.

The appliance itself never does this, and in a cluster it has no right to. Nothing is replaced that cannot be read,
and nothing while leases still need the CA that the last rotation has replaced.
"""

from __future__ import annotations

import base64
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from bkpool.appliance.kube_secrets import PKI
from bkpool.core.errors import Conflict, NotFound
from bkpool.core.names import GROUP
from bkpool.core.worker import Worker
from bkpool.home.lock import HomeLock
from bkpool.install.manifests import CONTROLLER
from bkpool.kube import ClusterAccess, Doc, KubeApi, paths
from bkpool.pki import storage
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.rotation import ROLLOUT, Former, may_rotate_again
from bkpool.settings.catalogue import all_settings
from bkpool.store import Listing, Store
from bkpool.store.bounds import StoreBounds
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.sqlite import SqliteStore

_RESTARTED = f"{GROUP}/rotated-at"
"""An annotation of the pods of an appliance in a cluster: its change makes Kubernetes replace them."""
_POOL_NAMESPACES = all_settings()["kubernetes.pool_namespaces"]


@dataclass(frozen=True, slots=True)
class AuthorityState:
    """The CA of an appliance, and the rotation that came last."""

    authority: Authority
    former: Former | None
    overlaps: bool
    """Whether the former CA is still trusted, because earlier leases may need it."""
    restarted: bool = False
    """Whether the appliance's pods are being replaced, so that they read the new CAs."""
    namespaces: tuple[str, ...] | None = None
    """The namespaces whose leases were looked at; empty: all of the cluster; None: there is no cluster."""

    def to_json(self) -> dict[str, Any]:
        """For the answer of a command. It has no key in it."""
        return {
            "authority": self.authority.mark,
            "expires": self.authority.not_after.isoformat(),
            "rotatedAt": self.former.rotated_at.isoformat(timespec="seconds") if self.former else None,
            "formerAuthority": self.former.authority.mark if self.former else None,
            "formerTrusted": self.overlaps,
            "restarted": self.restarted,
            "namespaces": None if self.namespaces is None else list(self.namespaces) or ["*"],
        }


async def of_home(home: Path, *, rotate: bool) -> AuthorityState:
    """The CA of an appliance whose workers are processes.

    Args:
        home: Its directory.
        rotate: Whether to replace the CA. The appliance must be stopped for that.

    Raises:
        NotFound: The home has no CA.
        Conflict: The last rotation is not over.
        HostFault: `AlreadyRunning`: the appliance runs. `Unreadable`: something cannot be read.
    """
    directory, now = home / "pki", datetime.now(UTC)
    async with AsyncExitStack() as stack:
        if rotate:
            stack.enter_context(HomeLock(home))
        if not directory.exists() or not (home / "state.db").exists():
            raise NotFound(f"{home} has no certificate authority", hint="`bkpool up` makes one.")
        secrets = storage.load_or_create(directory, now)
        store = await SqliteStore.open(home / "state.db", only_user=rotate)
        stack.push_async_callback(store.close)
        workers = await store.list(Worker)
        if not rotate:
            return _state(secrets.authority, secrets.former, workers, now)
        _require_end_of_last(secrets.former, workers, now)
        rotated = storage.rotate(directory, now)
        return _state(rotated.authority, rotated.former, workers, now)


async def of_cluster(access: ClusterAccess, namespace: str, *, rotate: bool) -> AuthorityState:
    """The CAs of an appliance whose workers are pods.

    Args:
        access: The cluster.
        namespace: The namespace of the appliance.
        rotate: Whether to replace the CAs. The pods of the appliance are then replaced, too.

    Raises:
        NotFound: The appliance has no CAs.
        Conflict: The last rotation is not over, or somebody else has just changed the Secret.
        HostFault: `Unreadable`: the Secret is damaged.
    """
    now, source = datetime.now(UTC), f"Secret {namespace}/{PKI}"
    api = await KubeApi.connect(access)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(api.close)
        path = paths.core("secrets", namespace, PKI)
        try:
            found = await api.get(path)
        except NotFound:
            raise NotFound(f"{source} does not exist", hint="Give the appliance's --namespace.") from None
        data = {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
        secrets = ClusterSecrets.of_data(data, source)
        namespaces = await _pool_namespaces(api, namespace)
        workers = await _workers(KubernetesStore(api, StoreBounds.of_installation(namespaces, namespace)))
        if not rotate:
            return replace(_state(secrets.authority, secrets.former, workers, now), namespaces=namespaces)
        _require_end_of_last(secrets.former, workers, now)
        rotated = secrets.rotated(now)
        new = {key: base64.b64encode(value).decode() for key, value in rotated.to_data().items()}
        await api.replace(path, {**found, "data": new})  # with its resourceVersion: never over another change
        restarted = await _restart(api, namespace, now)
        state = _state(rotated.authority, rotated.former, workers, now)
        return replace(state, restarted=restarted, namespaces=namespaces)


async def _workers(store: Store) -> Listing[Worker]:
    return await store.list(Worker)


async def _pool_namespaces(api: KubeApi, namespace: str) -> tuple[str, ...]:
    """The namespaces of the pools of an appliance in the cluster, as its Deployment names them; empty: all of them.

    The workers of another installation are signed by its own CAs, so they say nothing about these.
    """
    try:
        deployment = await api.get(paths.group("apps/v1", "deployments", namespace, CONTROLLER))
    except NotFound:
        return ()
    containers = deployment["spec"]["template"]["spec"]["containers"]
    found = (_of_arguments(one) or _of_environment(one) for one in containers)
    return next(filter(None, found), ())


def _of_arguments(container: Doc) -> tuple[str, ...]:
    """What --pool-namespace=NAME and --pool-namespace NAME give: as in the appliance, before the environment."""
    option, given = _POOL_NAMESPACES.option, [*(container.get("command") or ()), *(container.get("args") or ())]
    whole = [arg.removeprefix(f"{option}=") for arg in given if arg.startswith(f"{option}=")]
    return (*whole, *(name for arg, name in pairwise(given) if arg == option))


def _of_environment(container: Doc) -> tuple[str, ...]:
    """What the environment gives. A value from a ConfigMap is not known here, so all namespaces count."""
    name = _POOL_NAMESPACES.variable
    text = next((one.get("value") for one in container.get("env") or () if one["name"] == name), None)
    return _POOL_NAMESPACES.from_text(text, where=name, directory=Path()) if text else ()


async def _restart(api: KubeApi, namespace: str, now: datetime) -> bool:
    """Replaces the appliance's pods one after the other; returns whether there are any."""
    annotations = {"annotations": {_RESTARTED: now.isoformat(timespec="seconds")}}
    path = paths.group("apps/v1", "deployments", namespace, CONTROLLER)
    try:
        await api.patch(path, {"spec": {"template": {"metadata": annotations}}})
    except NotFound:
        return False
    return True


def _state(authority: Authority, former: Former | None, workers: Listing[Worker], now: datetime) -> AuthorityState:
    return AuthorityState(authority, former, not may_rotate_again(former, (*workers.items, *workers.unreadable), now))


def _require_end_of_last(former: Former | None, workers: Listing[Worker], now: datetime) -> None:
    """Raises Conflict while the former CA is needed: there is room for one only."""
    if workers.unreadable:
        raise Conflict(
            f"the worker {min(found.key for found in workers.unreadable)} cannot be read, and may have a lease",
            hint="Delete the object, or use the version of bkpool that wrote it.",
        )
    if former is not None and not may_rotate_again(former, workers.items, now):
        until = f"{former.rotated_at + ROLLOUT:%Y-%m-%d %H:%M} UTC"
        raise Conflict(
            "the last rotation is not over: earlier leases may still need the former certificate authority",
            hint=f"Wait until {until} and until the leases from before it have ended; see `bkpool pki show`.",
        )
