"""Opens the parts that differ between backends: a store, a runtime and the secrets.

Everything outside of this module is the same on every backend. What is opened is entered into the caller's exit
stack.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bkpool.allocation import Allocator, LeaseService
from bkpool.appliance import kube_secrets
from bkpool.appliance.access_control import BackendAuthenticators, MakeAuthenticators
from bkpool.appliance.reporting import StartupReporter
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.tuning import allowances, gc_defaults, kube_limits, leader_times, pod_deadlines
from bkpool.appliance.worker_network import open_process_workers
from bkpool.controller import Controller
from bkpool.controller.metrics import ControllerMetrics
from bkpool.core.allowances import Allowances
from bkpool.core.errors import Conflict, DiskFull, HostFault
from bkpool.core.pool import Pool
from bkpool.core.reconcile.failures import FailureLimits
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.gateway.net.dial import Dialler, PlainDial, TlsDialler
from bkpool.home.disk import fault_if_full
from bkpool.identity.service_accounts import ServiceAccountAuthenticator
from bkpool.identity.static_tokens import FileTokenReader, SecretTokenReader, StaticTokenAuthenticator
from bkpool.install import crds
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.kube.leader import LeaderElection
from bkpool.pki import storage
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.pki.rotation import Former, Rotation
from bkpool.store import Store
from bkpool.store.bounds import StoreBounds
from bkpool.store.events import KubernetesRecorder, LogRecorder, Recorder
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.workers import Runtime
from bkpool.workers.ignored_fields import IGNORED_IN_CLUSTER, IGNORED_WITH_HOST_GATEWAY
from bkpool.workers.pods.runtime import PodRuntime
from bkpool.workers.processes.runtime import Binaries

_KEYS_ONLY = {"pod-security.kubernetes.io/enforce": "restricted"}
"""The labels of the appliance's own namespace, which has its keys and no worker."""
LEASE = "bkpool-controller"
"""The Lease whose holder runs the controller."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts that differ from one backend to another."""

    store: Store
    runtime: Runtime
    authority: Authority
    """Signs the certificates of the gateway and of clients."""
    token_key: bytes
    dial: Dialler
    gateway: str
    """The name under which this appliance's gateway registers: the same in every run."""
    recorder: Recorder
    authenticators: MakeAuthenticators
    """Makes the authenticators that only this backend has."""
    former: Former | None = None
    """What there was before the last rotation of the CA."""
    api_authority: Authority | None = None
    """Signs the API's own certificate; None: `authority` does."""
    allowed: Allowances | None = None
    """What pools may ask for; None: everything, because whoever runs the appliance also makes the pools."""
    only_files: bool = False
    """Whether objects come from the user's files and from nowhere else."""
    missing_network: HostFault | None = None
    """Why workers have no network of their own although nobody wants that. Then only the admin is served."""
    full_disk: Callable[[], DiskFull | None] = lambda: None
    """Why there is no room for what a new lease needs on this machine; None: there is, or it needs none here."""
    leadership: LeaderElection | None = None
    """The election of the one controller; None if no other process can run one."""
    background: tuple[Coroutine[Any, Any, None], ...] = ()
    """What must run in the background while the backend is open."""

    def lease_service(
        self,
        mirror: Mirror,
        now: Callable[[], datetime],
        max_waiters: int,
        on_waiting: Callable[[], None],
        replica: str,
    ) -> tuple[Allocator, LeaseService]:
        """What creates, changes and ends leases. The caller closes the allocator.

        `on_waiting` is called when a request begins to wait.
        """
        leases = LeaseService(store=self.store, mirror=mirror, now=now)
        allocator = Allocator(
            store=self.store,
            mirror=mirror,
            leases=leases,
            authority=self.authority,
            token_key=self.token_key,
            caches=self.runtime.caches,
            answers=self.runtime.daemons.answers,
            now=now,
            max_waiters=max_waiters,
            rotation=Rotation(self.authority, self.former, now),
            on_waiting=on_waiting,
            replica=replica,
        )
        return allocator, leases

    def controller(
        self,
        mirror: Mirror,
        status_inputs: Callable[[Pool], PoolStatusInputs],
        metrics: ControllerMetrics,
        now: Callable[[], datetime],
        failure_limits: FailureLimits,
    ) -> Controller:
        """What carries out the policy with this store and runtime."""
        return Controller(
            store=self.store,
            mirror=mirror,
            daemons=self.runtime.daemons,
            caches=self.runtime.caches,
            now=now,
            status_inputs=status_inputs,
            recorder=self.recorder,
            metrics=metrics,
            failure_limits=failure_limits,
        )


async def open_process_backend(
    stack: AsyncExitStack, options: RunOptions, binaries: Binaries, report: StartupReporter
) -> Backend:
    """Opens the process backend: buildkitd processes on this machine, and one SQLite file."""
    home = options.home
    secrets = storage.load_or_create(home / "pki", datetime.now(UTC))
    report({"progress": "opening the store"})
    store = await SqliteStore.open(home / "state.db")
    stack.push_async_callback(store.close)
    workers = await open_process_workers(options, binaries, os.environ)
    runtime = workers.runtime
    stack.push_async_callback(runtime.close, stop_workers=True)
    files = FileTokenReader()
    stack.callback(files.close)
    return Backend(
        store=store,
        runtime=runtime,
        authority=secrets.authority,
        former=secrets.former,
        token_key=secrets.token_key,
        dial=PlainDial,
        gateway="local",  # one home has one gateway
        recorder=LogRecorder(),
        authenticators=lambda pools: BackendAuthenticators((StaticTokenAuthenticator(files, pools),)),
        only_files=True,
        missing_network=workers.missing_network,
        full_disk=lambda: fault_if_full(home),
        background=(runtime.bound_logs(),),
    )


@dataclass(frozen=True, slots=True)
class ClusterBackend:
    """A backend of pods, with the connection and the secrets that it uses."""

    api: KubeApi
    secrets: ClusterSecrets
    backend: Backend
    pods: PodRuntime


async def open_pod_backend(
    stack: AsyncExitStack,
    options: RunOptions,
    access: ClusterAccess,
    host_ports: tuple[int, ...] | None,
    report: StartupReporter,
) -> Backend:
    """Opens the pod backend for an appliance outside of the cluster that has every role.

    Args:
        stack: Closes what is opened.
        options: How the appliance runs.
        access: The cluster.
        host_ports: On kind: the ports of this machine that lead to workers. None: pods are reached by their address.
        report: Receives what is being done.
    """
    api = await KubeApi.connect(access, kube_limits(options.settings))
    stack.push_async_callback(api.close)
    report({"progress": "installing the custom resources"})
    await crds.install(api)
    await _ensure_namespace(api, options.settings.kubernetes.namespace)
    name = _gateway_name(options.home)
    on_kind = host_ports is not None
    opened = await _open_pods(
        stack,
        options,
        api,
        name,
        ignored_fields=IGNORED_WITH_HOST_GATEWAY,
        host_ports=host_ports,
        allowed=None if on_kind else allowances(options.settings),
    )
    return opened.backend


async def open_replica_backend(stack: AsyncExitStack, options: RunOptions, name: str) -> ClusterBackend:
    """Opens the pod backend for a replica inside the cluster, where the manifests have installed everything.

    Args:
        stack: Closes what is opened.
        options: How the replica runs.
        name: The replica's name, unique among those that run.
    """
    api = await KubeApi.connect(options.access, kube_limits(options.settings))
    stack.push_async_callback(api.close)
    opened = await _open_pods(
        stack,
        options,
        api,
        name,
        ignored_fields=IGNORED_IN_CLUSTER,
        host_ports=None,
        allowed=allowances(options.settings),
    )
    if not options.settings.api.tls:
        return opened
    namespace, now = options.settings.kubernetes.namespace, datetime.now(UTC)
    authority = await kube_secrets.load_or_create_api_authority(api, namespace, opened.secrets, now)
    return replace(opened, backend=replace(opened.backend, api_authority=authority))


async def _open_pods(
    stack: AsyncExitStack,
    options: RunOptions,
    api: KubeApi,
    name: str,
    *,
    ignored_fields: Collection[str],
    host_ports: tuple[int, ...] | None,
    allowed: Allowances | None,
) -> ClusterBackend:
    kubernetes = options.settings.kubernetes
    store = KubernetesStore(api, StoreBounds.of_installation(kubernetes.pool_namespaces, kubernetes.namespace))
    now = datetime.now(UTC)
    secrets = await kube_secrets.load_or_create_authorities(api, kubernetes.namespace, store, now)
    runtime = PodRuntime(
        api,
        authorities=PoolAuthorities(*secrets.backends),
        name=name,
        image=options.settings.workers.buildkit_image,
        host_ports=host_ports,
        namespaces=kubernetes.pool_namespaces or None,
        ignored_spec_fields=ignored_fields,
        deadlines=pod_deadlines(options.settings),
        gc_defaults=gc_defaults(options.settings),
        allowed=allowed,
    )
    stack.push_async_callback(runtime.close, stop_workers=False)
    recorder = KubernetesRecorder(api, name)
    backend = Backend(
        store=store,
        runtime=runtime,
        authority=secrets.authority,
        former=secrets.former,
        token_key=secrets.token_key,
        dial=TlsDialler(runtime.contexts.of),
        gateway=name,
        recorder=recorder,
        authenticators=_cluster_authenticators(api, options),
        leadership=LeaderElection(
            api,
            kubernetes.namespace,
            LEASE,
            name,
            times=leader_times(options.settings),
        ),
        allowed=allowed,
        background=(recorder.run(),),
    )
    return ClusterBackend(api, secrets, backend, runtime)


def _cluster_authenticators(api: KubeApi, options: RunOptions) -> MakeAuthenticators:
    identity = options.settings.identity
    fresh, timeout = identity.secret_fresh.total_seconds(), identity.secret_timeout.total_seconds()
    review_timeout = identity.token_review_timeout.total_seconds()
    return lambda pools: BackendAuthenticators(
        static=(StaticTokenAuthenticator(SecretTokenReader(api, fresh=fresh, timeout=timeout), pools),),
        signed=(ServiceAccountAuthenticator(api, options.audience, timeout=review_timeout),),
    )


async def _ensure_namespace(api: KubeApi, name: str) -> None:
    try:
        await api.create(paths.core("namespaces"), {"metadata": {"name": name, "labels": _KEYS_ONLY}})
    except Conflict:
        return


def _gateway_name(home: Path) -> str:
    """The same name for every run of one home, and another name for another home against the same cluster."""
    place = f"{socket.gethostname()}\0{home.absolute()}"
    return f"host-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
