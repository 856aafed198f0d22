"""The Secrets of an appliance in its cluster: its authorities and its admin token, made once and read ever after.

Creating decides between appliances that begin at the same moment; who comes second reads. What is damaged, or gone
although leases were signed with it, is an error and never made anew (DESIGN rule 7).
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

import structlog

from bkpool.core.errors import Conflict, HostFault, NotFound
from bkpool.core.names import LABEL_MANAGED, MANAGER
from bkpool.core.worker import Worker
from bkpool.kube import Doc, KubeApi, paths
from bkpool.pki.bundle import ClusterSecrets
from bkpool.store import Store

log = structlog.get_logger(__name__)

PKI, ADMIN = "bkpool-pki", "bkpool-admin"


async def load_or_create(api: KubeApi, namespace: str, store: Store, now: datetime) -> ClusterSecrets:
    """The authorities of the appliance in this namespace.

    Raises:
        HostFault: `Unreadable`: the Secret is damaged, or it is gone and there are leases that were signed with it.
    """

    async def made() -> Mapping[str, bytes]:
        leased = [str(worker.key) for worker in (await store.list(Worker)).items if worker.lease]
        if leased:
            raise HostFault(
                f"Secret {namespace}/{PKI} is missing, and there are leases that were signed with it: {leased[0]}, …",
                hint="Restore it from a backup. If it is lost: delete the workers first, which ends their leases.",
                code="Unreadable",
            )
        return ClusterSecrets.create(now).to_data()

    return ClusterSecrets.of_data(await _kept(api, namespace, PKI, made), f"Secret {namespace}/{PKI}")


async def admin_token(api: KubeApi, namespace: str) -> str:
    """The bearer token of the appliance's admin, made if there is none.

    Raises:
        HostFault: `Unreadable`: the Secret has no token.
    """

    async def made() -> Mapping[str, bytes]:
        return {"token": secrets.token_urlsafe(32).encode()}

    token = (await _kept(api, namespace, ADMIN, made)).get("token", b"").decode("ascii", "replace").strip()
    if not token:
        raise HostFault(
            f"Secret {namespace}/{ADMIN}: token is missing",
            hint=f"Delete the Secret to have a new one: kubectl -n {namespace} delete secret {ADMIN}",
            code="Unreadable",
        )
    return token


async def _kept(
    api: KubeApi, namespace: str, name: str, make: Callable[[], Awaitable[Mapping[str, bytes]]]
) -> dict[str, bytes]:
    try:
        found = await api.get(paths.core("secrets", namespace, name))
    except NotFound:
        found = await _create(api, namespace, name, await make())
    return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}


async def _create(api: KubeApi, namespace: str, name: str, data: Mapping[str, bytes]) -> Doc:
    body: Doc = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {LABEL_MANAGED: MANAGER}},
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }
    try:
        made = await api.create(paths.core("secrets", namespace), body)
    except Conflict:  # another appliance was faster: its Secret is the one
        return await api.get(paths.core("secrets", namespace, name))
    log.info("secret.created", namespace=namespace, name=name)
    return made
