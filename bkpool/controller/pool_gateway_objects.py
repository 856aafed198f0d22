"""Describes the gateway of a pool in a cluster: its pods, rights and policies. pool_service.py has the Service.

Pure: a pool in, documents out. Every document is complete, so that nothing remains of an earlier spec when it is
applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from bkpool.controller.pool_documents import LABELS, gateway_labels, gateway_name, labels_of, pool_document
from bkpool.controller.pool_service import service, service_type
from bkpool.core import durations
from bkpool.core.ignored import is_foreign_gateway
from bkpool.core.names import (
    GATEWAY_PORT,
    GROUP,
    LABEL_LEASED,
    METRICS_PORT,
    PURPOSE_WORKER,
    WORKER_PORT,
)
from bkpool.core.pool import Pool, ServiceType
from bkpool.kube import Doc

REPLICAS = 2
"""Gateway pods of a pool by default, so that one can be evicted while a node is drained."""
GRACE = timedelta(seconds=30)
"""Added to the drain timeout: the gateway must first leave the Service, and needs time to exit at the end."""
_USER = 65532  # as in the Containerfile
_MOUNT = "/home/bkpool"


@dataclass(frozen=True, slots=True)
class GatewayDefaults:
    """What is the same for all pools of an appliance."""

    image: str
    """bkpool's own image, for pools that do not set spec.gatewayImage."""
    namespace: str
    """The namespace of the appliance."""
    appliance: str
    """The label app.kubernetes.io/name of the appliance's pods."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of the gateways: settings that are not the default."""
    heartbeats: bool = False
    """Whether the controller follows their heartbeats. Without the right to write them they renew each lease."""


def pool_objects(pool: Pool, defaults: GatewayDefaults) -> list[Doc]:
    """All documents but the Secret, in the order in which they must be applied: the Service first, the pods last."""
    return [
        service(pool),
        _service_account(pool),
        _role(pool, defaults),
        _role_binding(pool),
        _gateway_policy(pool),
        _worker_policy(pool, defaults),
        _gateway_budget(pool),
        _leased_budget(pool),
        deployment(pool, defaults),
    ]


def secret(pool: Pool, data: Mapping[str, str]) -> Doc:
    """The gateway's certificates; the values are in base64."""
    return pool_document(pool, "v1", "Secret", gateway_name(pool), type="Opaque", data=dict(data))


# --- the gateway's pods ---------------------------------------------------------------------------------------------


def deployment(pool: Pool, defaults: GatewayDefaults) -> Doc:
    """The gateway's pods. An old pod stops only when a new one is ready, and exits after its builds have ended."""
    drain = pool.spec.gateway.drain_timeout
    replicas = pool.spec.gateway.replicas
    labels = gateway_labels(pool)
    pod: Doc = {
        "serviceAccountName": gateway_name(pool),
        "terminationGracePeriodSeconds": round((drain + GRACE).total_seconds()),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ],
        "containers": [_container(pool, defaults)],
        "volumes": [{"name": "home", "emptyDir": {}}],
    }
    return pool_document(
        pool,
        "apps/v1",
        "Deployment",
        gateway_name(pool),
        spec={
            "replicas": REPLICAS if replicas is None else replicas,
            "selector": {"matchLabels": labels},
            "progressDeadlineSeconds": 120,  # after that, the pool's status says what is wrong
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": {**LABELS, **labels}}, "spec": pod},
        },
    )


def _container(pool: Pool, defaults: GatewayDefaults) -> Doc:
    given = pool.spec.gateway_image
    image = defaults.image if given is None or is_foreign_gateway(given) else given
    return {
        "name": "gateway",
        "image": image,
        "args": [
            "up",
            "--backend=kubernetes",
            "--roles=gateway",
            f"--pool={pool.key}",
            f"--gateway-address=0.0.0.0:{GATEWAY_PORT}",
            f"--metrics-address=0.0.0.0:{METRICS_PORT}",
            f"--drain-timeout={durations.render(pool.spec.gateway.drain_timeout)}",
        ],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            {"name": "HOME", "value": _MOUNT},
            {"name": "TMPDIR", "value": _MOUNT},
            {"name": "BKPOOL_HOME", "value": f"{_MOUNT}/state"},
            *({"name": name, "value": value} for name, value in defaults.variables.items()),
        ],
        "ports": [
            {"name": "gateway", "containerPort": GATEWAY_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {**_probe("/health"), "initialDelaySeconds": 2, "periodSeconds": 1, "failureThreshold": 300},
        "livenessProbe": {**_probe("/health"), "periodSeconds": 10, "timeoutSeconds": 5},
        "readinessProbe": {**_probe("/ready"), "periodSeconds": 2, "timeoutSeconds": 2},
        "resources": _resources(pool),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "home", "mountPath": _MOUNT}],
    }


def _probe(path: str) -> Doc:
    return {"httpGet": {"path": path, "port": "metrics"}}


def _resources(pool: Pool) -> Doc:
    """The resources from spec.gateway, or a small request. `cpu` and `memory` are limits."""
    given = pool.spec.gateway.resources
    limits = {name: value for name, value in (("cpu", given.cpu), ("memory", given.memory)) if value is not None}
    limits |= given.limits
    requests = given.requests or {name: value for name, value in _SMALL.items() if name not in limits}
    return {"requests": dict(requests), **({"limits": limits} if limits else {})}


_SMALL = {"cpu": "100m", "memory": "128Mi"}

# --- rights and policies --------------------------------------------------------------------------------------------


def _service_account(pool: Pool) -> Doc:
    return pool_document(pool, "v1", "ServiceAccount", gateway_name(pool))


def _role(pool: Pool, defaults: GatewayDefaults) -> Doc:
    """A gateway may read pools and workers, write workers' status and heartbeats, and read its own certificates."""
    beat = [("gateways", ["get", "create"]), ("gateways/status", ["update"])] if defaults.heartbeats else []
    rules = [
        _rule([GROUP], ["buildkitpools", "buildkitworkers"], ["get", "list", "watch"]),
        _rule([GROUP], ["buildkitworkers/status"], ["update", "patch"]),
        _rule([""], ["secrets"], ["get", "list", "watch"], [gateway_name(pool)]),
        _rule(["", "events.k8s.io"], ["events"], ["create"]),
        *(_rule([GROUP], [f"buildkit{what}"], verbs) for what, verbs in beat),
    ]
    return pool_document(pool, "rbac.authorization.k8s.io/v1", "Role", gateway_name(pool), rules=rules)


def _rule(groups: list[str], resources: list[str], verbs: list[str], names: Sequence[str] = ()) -> Doc:
    only = {"resourceNames": list(names)} if names else {}
    return {"apiGroups": groups, "resources": resources, "verbs": verbs, **only}


def _role_binding(pool: Pool) -> Doc:
    name, api = gateway_name(pool), "rbac.authorization.k8s.io"
    return pool_document(
        pool,
        f"{api}/v1",
        "RoleBinding",
        name,
        roleRef={"apiGroup": api, "kind": "Role", "name": name},
        subjects=[{"kind": "ServiceAccount", "name": name, "namespace": pool.key.namespace}],
    )


def _gateway_policy(pool: Pool) -> Doc:
    """Limits who may reach the gateway. A load balancer does that itself, and its nodes forward connections then."""
    cidrs = pool.spec.networking.allowed_cidrs
    limited = bool(cidrs) and service_type(pool) is not ServiceType.LOAD_BALANCER
    clients: Doc = {"ports": [{"port": GATEWAY_PORT, "protocol": "TCP"}]}
    if limited:
        clients["from"] = [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]
    metrics: Doc = {"ports": [{"port": METRICS_PORT, "protocol": "TCP"}]}
    return _policy(pool, gateway_name(pool), gateway_labels(pool), [clients, metrics])


def _worker_policy(pool: Pool, defaults: GatewayDefaults) -> Doc:
    """Only the pool's gateways may reach its workers, and the appliance, which asks them whether they are ready."""
    gateways = {"podSelector": {"matchLabels": gateway_labels(pool)}}
    appliance = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": defaults.namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": defaults.appliance}},
    }
    reached = {"ports": [{"port": WORKER_PORT, "protocol": "TCP"}], "from": [gateways, appliance]}
    return _policy(pool, f"{pool.key.name}-workers", labels_of(pool, PURPOSE_WORKER), [reached])


def _policy(pool: Pool, name: str, selected: Doc, ingress: list[Doc]) -> Doc:
    spec = {"podSelector": {"matchLabels": selected}, "policyTypes": ["Ingress"], "ingress": ingress}
    return pool_document(pool, "networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)


def _gateway_budget(pool: Pool) -> Doc:
    return _budget(pool, gateway_name(pool), {"maxUnavailable": 1}, gateway_labels(pool))


def _leased_budget(pool: Pool) -> Doc:
    """Leased workers must not be evicted."""
    selected = {**labels_of(pool, PURPOSE_WORKER), LABEL_LEASED: "true"}
    return _budget(pool, f"{pool.key.name}-leased", {"maxUnavailable": 0}, selected)


def _budget(pool: Pool, name: str, allowed: Doc, selected: Doc) -> Doc:
    spec = {**allowed, "selector": {"matchLabels": selected}}
    return pool_document(pool, "policy/v1", "PodDisruptionBudget", name, spec=spec)
