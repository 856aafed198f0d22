"""Turns settings into what other rooms take as arguments. The only place that knows both names."""

from __future__ import annotations

from collections.abc import Mapping

from bkpool.api import ApiLimits, HttpLimits
from bkpool.core.allowances import Allowances
from bkpool.core.descriptors import ConnectionShares
from bkpool.core.pool import CacheGC
from bkpool.core.reconcile.failures import FailureLimits
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.install.manifests import IMAGE
from bkpool.kube import KubeLimits
from bkpool.kube.leader import LeaderTimes
from bkpool.settings import Settings
from bkpool.settings.catalogue import Setting, all_settings
from bkpool.settings.kinds import COUNT, DURATION
from bkpool.settings.model import Role
from bkpool.workers.pods.pod_spec import PRIVILEGED_IMAGE, ROOTLESS_IMAGE
from bkpool.workers.pods.runtime import Deadlines
from bkpool.workers.processes.runtime import ProcessLimits


def wanted_shares(settings: Settings) -> ConnectionShares:
    """How many connections the servers of this process want."""
    roles = settings.appliance.roles
    api, gateway = Role.API in roles, Role.GATEWAY in roles
    return ConnectionShares(
        api=settings.api.connections if api else 0,
        gateway_pending=settings.gateway.pending_connections if gateway else 0,
        gateway=settings.gateway.connections if gateway else 0,
    )


def api_limits(settings: Settings) -> ApiLimits:
    """What a caller of the API may ask for."""
    values = settings.api
    return ApiLimits(values.max_body, values.body_timeout.total_seconds(), values.max_wait)


def http_limits(settings: Settings, shares: ConnectionShares | None = None) -> HttpLimits:
    """The limits of the API's connections, within its share of file descriptors."""
    values = settings.api
    connections = values.connections if shares is None else min(values.connections, shares.api)
    return HttpLimits(
        connections=connections,
        connections_per_address=_of_one(values.connections_per_address, connections, values.connections),
        header_timeout=values.header_timeout.total_seconds(),
        idle_timeout=values.idle_timeout.total_seconds(),
    )


def gateway_limits(settings: Settings, shares: ConnectionShares | None = None) -> GatewayLimits:
    """The limits of a gateway, within its share of file descriptors. Those without a setting keep their default."""
    values = settings.gateway
    wanted = ConnectionShares(gateway_pending=values.pending_connections, gateway=values.connections)
    shares = shares or wanted
    pending = min(shares.gateway_pending, wanted.gateway_pending)
    return GatewayLimits(
        handshake_timeout=values.handshake_timeout.total_seconds(),
        register_timeout=values.register_timeout.total_seconds(),
        dial_timeout=values.dial_timeout.total_seconds(),
        first_wait=values.first_wait.total_seconds(),
        second_wait=values.second_wait.total_seconds(),
        refusal_timeout=values.refusal_timeout.total_seconds(),
        linger_timeout=values.linger_timeout.total_seconds(),
        client_peer_timeout=values.client_peer_timeout.total_seconds(),
        worker_peer_timeout=values.worker_peer_timeout.total_seconds(),
        half_open_timeout=values.half_open_timeout.total_seconds(),
        drain_idle_timeout=values.drain_idle_timeout.total_seconds(),
        pending_connections=pending,
        pending_connections_per_address=_of_one(
            values.pending_connections_per_address, pending, wanted.gateway_pending
        ),
        connections=min(shares.gateway, wanted.gateway),
        connections_per_pool=values.connections_per_pool,
        connections_per_lease=values.connections_per_lease,
    )


def _of_one(wanted: int, given: int, asked: int) -> int:
    """The part of one address: where a server gets fewer connections than it asked for, as much smaller."""
    return wanted if given == asked else max(1, wanted * given // asked)


def failure_limits(settings: Settings) -> FailureLimits:
    """How often and after which pauses the controller starts a worker that failed."""
    values = settings.controller
    return FailureLimits(values.max_failures, values.stable_after, values.backoff, values.backoff_max)


def gc_defaults(settings: Settings) -> CacheGC:
    """What a pool's spec gets where it says nothing about garbage collection."""
    values = settings.workers
    return CacheGC(
        keep_storage=values.gc_keep_storage,
        reserved_space=values.gc_reserved_space,
        min_free_space=values.gc_min_free_space,
        keep_duration=values.gc_keep_duration or None,
    )


def process_limits(settings: Settings) -> ProcessLimits:
    """How many buildkitd processes may start at once, and how long one may take."""
    values = settings.workers
    return ProcessLimits(
        concurrent_starts=values.concurrent_starts,
        start_timeout=values.start_timeout.total_seconds(),
        adopt_timeout=values.adopt_timeout.total_seconds(),
        stop_timeout=values.stop_timeout.total_seconds(),
        log_size=values.log_size,
    )


def pod_deadlines(settings: Settings) -> Deadlines:
    """How long each stage of a pod's start may take."""
    values = settings.workers
    return Deadlines(
        scheduling=values.pod_scheduling_timeout.total_seconds(),
        pulling=values.pod_pull_timeout.total_seconds(),
        creating=values.pod_creation_timeout.total_seconds(),
        answering=values.start_timeout.total_seconds(),
        ending=values.pod_deletion_timeout.total_seconds(),
    )


def kube_limits(settings: Settings) -> KubeLimits:
    """How long this process waits for an API server."""
    values = settings.kubernetes
    return KubeLimits(
        connect_timeout=values.connect_timeout.total_seconds(),
        request_timeout=values.request_timeout.total_seconds(),
        idle_timeout=values.idle_timeout.total_seconds(),
        watch_duration=values.watch_duration.total_seconds(),
        watch_silence=values.watch_silence.total_seconds(),
    )


def leader_times(settings: Settings) -> LeaderTimes:
    """The times of the election of the one controller."""
    return LeaderTimes.of(settings.kubernetes.leader_lease.total_seconds())


def allowances(settings: Settings) -> Allowances:
    """What pools in a cluster may ask for."""
    values, workers = settings.allow, settings.workers
    own = {ROOTLESS_IMAGE, PRIVILEGED_IMAGE, workers.buildkit_image, settings.kubernetes.image or IMAGE}
    return Allowances(
        hosts=frozenset(values.hosts),
        privileged=frozenset(values.privileged),
        images=values.images,
        load_balancers=frozenset(values.load_balancers),
        service_annotations=frozenset(values.annotations),
        own_images=frozenset(image for image in own if image),
    )


def passed_to_gateways(one: Setting) -> bool:
    """Whether the controller passes a setting on to the gateways of pools in a cluster."""
    return (
        one.section in {"gateway", "kubernetes", "metrics"}
        and one.kind in {COUNT, DURATION}
        and one.name != "kubernetes.leader_lease"  # a gateway takes part in no election
    )


def gateway_variables(settings: Settings) -> Mapping[str, str]:
    """Environment variables that give the gateways of pools in a cluster the same limits as this process has."""
    variables = {}
    for one in all_settings().values():
        if passed_to_gateways(one):
            value = getattr(getattr(settings, one.section), one.field)
            if value != one.default:  # others stay out, so that a Deployment changes only when it must
                variables[one.variable] = one.text(value)
    return variables
