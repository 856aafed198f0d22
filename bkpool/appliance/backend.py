"""What an appliance stands on: a store, a runtime and the secrets, opened for one backend.

Everything beyond this module is the same on every backend. What is opened is entered into the caller's exit stack.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bkpool.allocation import Allocator, LeaseService
from bkpool.appliance import cluster_secrets
from bkpool.appliance.identities import Methods
from bkpool.appliance.settings import Settings, Tell
from bkpool.controller import Controller
from bkpool.core.errors import Conflict
from bkpool.core.pool import Pool
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.gateway.net.dial import Dialler, PlainDial, TlsDialler
from bkpool.identity.service_accounts import ServiceAccountAuthenticator
from bkpool.identity.static_tokens import FileTokenReader, SecretTokenReader, StaticTokenAuthenticator
from bkpool.install import crds
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.kube.leader import LeaderElection
from bkpool.pki import storage
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.worker_tls import worker_context
from bkpool.store import Store
from bkpool.store.events import KubernetesRecorder, LogRecorder, Recorder
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.workers import Runtime
from bkpool.workers.ignored_fields import IGNORED_IN_CLUSTER, IGNORED_WITH_HOST_GATEWAY
from bkpool.workers.pods.runtime import PodRuntime
from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries

LEASE = "bkpool-controller"
"""The Lease whose holder runs the controller."""
PROCESS_LIFE = timedelta(days=3650)
"""Of a certificate that is in memory only: it ends with the process."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts that differ from one backend to another."""

    store: Store
    runtime: Runtime
    authority: Authority
    """Of the gateway's and the clients' certificates."""
    token_key: bytes
    dial: Dialler
    gateway: str
    """The name under which this appliance's gateway registers: the same over all its lives."""
    recorder: Recorder
    methods: Methods
    """Ways of knowing a caller."""
    only_files: bool = False
    """Objects come from the user's files and nowhere else."""
    leadership: LeaderElection | None = None
    """Where others might run a controller too."""
    loops: tuple[Coroutine[Any, Any, None], ...] = ()
    """What must run beside."""

    def lease_service(self, mirror: Mirror, now: Callable[[], datetime]) -> tuple[Allocator, LeaseService]:
        """What makes, changes and ends leases over these parts; the claims are to be closed."""
        leases = LeaseService(store=self.store, mirror=mirror, now=now)
        claims = Allocator(
            store=self.store,
            mirror=mirror,
            leases=leases,
            authority=self.authority,
            token_key=self.token_key,
            caches=self.runtime.caches,
            now=now,
        )
        return claims, leases

    def controller(
        self, mirror: Mirror, status_inputs: Callable[[Pool], PoolStatusInputs], now: Callable[[], datetime]
    ) -> Controller:
        """The controller over these parts."""
        return Controller(
            store=self.store,
            mirror=mirror,
            runtime=self.runtime,
            now=now,
            status_inputs=status_inputs,
            recorder=self.recorder,
        )


async def open_process(stack: AsyncExitStack, settings: Settings, binaries: Binaries, tell: Tell) -> Backend:
    """Processes of buildkitd on this machine, and one SQLite file."""
    home = settings.home
    secrets = storage.load_or_create(home / "pki", datetime.now(UTC))
    tell({"progress": "opening the store"})
    store = await SqliteStore.open(home / "state.db")
    stack.push_async_callback(store.close)
    runtime = ProcessRuntime(home, binaries)
    stack.push_async_callback(runtime.close, stop_workers=True)
    return Backend(
        store=store,
        runtime=runtime,
        authority=secrets.authority,
        token_key=secrets.token_key,
        dial=PlainDial,
        gateway="local",  # one home has one gateway
        recorder=LogRecorder(),
        methods=lambda pools: (StaticTokenAuthenticator(FileTokenReader(), pools),),
        only_files=True,
    )


@dataclass(frozen=True, slots=True)
class InCluster:
    """A backend of pods, and what stands behind it."""

    api: KubeApi
    secrets: ClusterSecrets
    backend: Backend


async def open_cluster(
    stack: AsyncExitStack, settings: Settings, access: ClusterAccess, host_ports: tuple[int, ...] | None, tell: Tell
) -> Backend:
    """Pods in a cluster and custom resources, for an appliance that runs beside the cluster, with every role.

    Args:
        stack: What closes it again.
        settings: How the appliance runs.
        access: The cluster.
        host_ports: On kind: the ports of this machine that lead to workers. None: pods are reached by their address.
        tell: Told what is being done.
    """
    api = await KubeApi.connect(access)
    stack.push_async_callback(api.close)
    tell({"progress": "installing the custom resources"})
    await crds.install(api)
    await _ensure_namespace(api, settings.namespace)
    opened = await _opened(
        stack, settings, api, _name_of(settings.home), ignored=IGNORED_WITH_HOST_GATEWAY, host_ports=host_ports
    )
    return opened.backend


async def open_in_cluster(stack: AsyncExitStack, settings: Settings, name: str) -> InCluster:
    """The same for a replica inside: the manifests have installed everything.

    Args:
        stack: What closes it again.
        settings: How the replica runs.
        name: The replica's, unique among those that live.
    """
    api = await KubeApi.connect(settings.access)
    stack.push_async_callback(api.close)
    return await _opened(stack, settings, api, name, ignored=IGNORED_IN_CLUSTER, host_ports=None)


async def _opened(
    stack: AsyncExitStack,
    settings: Settings,
    api: KubeApi,
    name: str,
    *,
    ignored: Collection[str],
    host_ports: tuple[int, ...] | None,
) -> InCluster:
    store = KubernetesStore(api)
    now = datetime.now(UTC)
    secrets = await cluster_secrets.load_or_create(api, settings.namespace, store, now)
    leaf = secrets.backend.issue_dialler(name, now, now + PROCESS_LIFE)
    context = worker_context(leaf.cert_pem, leaf.key_pem or b"", secrets.backend.cert_pem)
    runtime = PodRuntime(
        api,
        backend=secrets.backend,
        context=context,
        image=settings.buildkit_image,
        host_ports=host_ports,
        namespaces=settings.pool_namespaces or None,
        ignored_spec_fields=ignored,
    )
    stack.push_async_callback(runtime.close, stop_workers=False)
    recorder = KubernetesRecorder(api, name)
    backend = Backend(
        store=store,
        runtime=runtime,
        authority=secrets.authority,
        token_key=secrets.token_key,
        dial=TlsDialler(context),
        gateway=name,
        recorder=recorder,
        methods=lambda pools: (
            StaticTokenAuthenticator(SecretTokenReader(api), pools),
            ServiceAccountAuthenticator(api),
        ),
        leadership=LeaderElection(api, settings.namespace, LEASE, name),
        loops=(recorder.run(),),
    )
    return InCluster(api, secrets, backend)


async def _ensure_namespace(api: KubeApi, name: str) -> None:
    try:
        await api.create(paths.core("namespaces"), {"metadata": {"name": name}})
    except Conflict:
        return


def _name_of(home: Path) -> str:
    """One home is one appliance over all its lives; two homes against one cluster are two."""
    place = f"{socket.gethostname()}\0{home.absolute()}"
    return f"host-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
