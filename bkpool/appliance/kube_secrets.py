"""The Secrets of an appliance in its cluster: its certificate authorities and its admin token.

Each is created once and only read afterwards. If two appliances start at the same moment, the one that creates the
Secret wins and the other reads it. A Secret that is damaged, or missing although leases were signed with it, is an
error: it is never created again (rule 7, docs/rules.md#r7).
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

import structlog

from bkpool.core.errors import Conflict, Forbidden, HostFault, NotFound
from bkpool.core.names import LABEL_MANAGED, MANAGER
from bkpool.core.worker import Worker
from bkpool.kube import Doc, KubeApi, paths
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import ClusterSecrets, api_authority_data, api_authority_of
from bkpool.store import Store

log = structlog.get_logger(__name__)

PKI, ADMIN, API_CA = "bkpool-pki", "bkpool-admin", "bkpool-api-ca"


async def load_or_create_authorities(api: KubeApi, namespace: str, store: Store, now: datetime) -> ClusterSecrets:
    """The certificate authorities of the appliance in this namespace, created if there are none.

    Raises:
        HostFault: `Unreadable`: the Secret is damaged, or it is missing and there are leases that were signed with
        it.
    """

    async def create() -> Mapping[str, bytes]:
        workers = await store.list(Worker)
        leased = [str(worker.key) for worker in workers.items if worker.lease]
        leased += [str(found.key) for found in workers.unreadable]  # they may have a lease
        if leased:
            raise HostFault(
                f"Secret {namespace}/{PKI} is missing, but it signed the leases of workers such as {leased[0]}",
                hint="Restore it from a backup. If there is none, delete the workers first, which ends their leases.",
                code="Unreadable",
            )
        return ClusterSecrets.create(now).to_data()

    return ClusterSecrets.of_data(await _get_or_create(api, namespace, PKI, create), f"Secret {namespace}/{PKI}")


async def load_or_create_api_authority(
    api: KubeApi, namespace: str, others: ClusterSecrets, now: datetime
) -> Authority:
    """The CA of the API's own certificate, created if there is none. Callers trust its `ca.crt`.

    Args:
        api: The cluster.
        namespace: The namespace of the appliance.
        others: The appliance's other CAs, which must not be this one.
        now: The time.

    Raises:
        HostFault: `Unreadable`: the Secret is damaged.
        Forbidden: The manifests are those of an older version.
    """

    async def create() -> Mapping[str, bytes]:
        return api_authority_data(now)

    try:
        data = await _get_or_create(api, namespace, API_CA, create)
    except Forbidden as error:
        raise Forbidden(error.message, hint=f"Apply `bkpool manifests` of this version: {API_CA} is new.") from None
    return api_authority_of(data, others, f"Secret {namespace}/{API_CA}")


async def load_or_create_admin_token(api: KubeApi, namespace: str) -> str:
    """The bearer token of the appliance's admin, created if there is none.

    Raises:
        HostFault: `Unreadable`: the Secret has no token.
    """

    async def create() -> Mapping[str, bytes]:
        return {"token": secrets.token_urlsafe(32).encode()}

    data = await _get_or_create(api, namespace, ADMIN, create)
    token = data.get("token", b"").decode("ascii", "replace").strip()
    if not token:
        raise HostFault(
            f"Secret {namespace}/{ADMIN}: token is missing",
            hint=f"Delete the Secret, and a new one is created: kubectl -n {namespace} delete secret {ADMIN}",
            code="Unreadable",
        )
    return token


async def _get_or_create(
    api: KubeApi, namespace: str, name: str, create: Callable[[], Awaitable[Mapping[str, bytes]]]
) -> dict[str, bytes]:
    try:
        found = await api.get(paths.core("secrets", namespace, name))
    except NotFound:
        found = await _create(api, namespace, name, await create())
    return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}


async def _create(api: KubeApi, namespace: str, name: str, data: Mapping[str, bytes]) -> Doc:
    body: Doc = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {LABEL_MANAGED: MANAGER}},
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }
    try:
        created = await api.create(paths.core("secrets", namespace), body)
    except Conflict:  # another appliance was faster: use its Secret
        return await api.get(paths.core("secrets", namespace, name))
    log.info("secret.created", namespace=namespace, name=name)
    return created
