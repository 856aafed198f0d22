"""Describes a pool's Service, and says by which names and addresses callers reach the gateway through it.

Pure: a pool and the Service as it is go in, a document or an address comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bkpool.controller.pool_documents import gateway_labels, pool_document
from bkpool.core.names import GATEWAY_PORT
from bkpool.core.pool import Pool, ServiceType
from bkpool.kube import Doc


def service(pool: Pool) -> Doc:
    """The pool's Service, which has the pool's name."""
    gateway, networking = pool.spec.gateway, pool.spec.networking
    kind = service_type(pool)
    port: Doc = {"name": "gateway", "port": service_port(pool), "targetPort": "gateway", "protocol": "TCP"}
    if kind is not ServiceType.CLUSTER_IP and gateway.node_port is not None:
        port["nodePort"] = gateway.node_port
    spec: Doc = {"type": kind.value, "selector": gateway_labels(pool), "ports": [port]}
    if kind is ServiceType.LOAD_BALANCER:
        if gateway.load_balancer_class:
            spec["loadBalancerClass"] = gateway.load_balancer_class
        if networking.allowed_cidrs:
            spec["loadBalancerSourceRanges"] = list(networking.allowed_cidrs)
    if kind is ServiceType.NODE_PORT and networking.allowed_cidrs:
        # Otherwise the policy would see the address of a node instead of the caller's.
        spec["externalTrafficPolicy"] = "Local"
    annotations = {**networking.annotations, **networking.external.annotations}
    return pool_document(pool, "v1", "Service", pool.key.name, annotations=annotations, spec=spec)


def service_type(pool: Pool) -> ServiceType:
    """gateway.serviceType, else networking.serviceType, else ClusterIP."""
    return pool.spec.gateway.service_type or pool.spec.networking.service_type or ServiceType.CLUSTER_IP


def service_port(pool: Pool) -> int:
    """gateway.port, else networking.port, else 1235."""
    return pool.spec.gateway.port or pool.spec.networking.port or GATEWAY_PORT


def outside_hosts(pool: Pool, live: Doc | None, node_address: str | None) -> list[str]:
    """The names and addresses by which callers outside the cluster reach the gateway, the preferred one first.

    Args:
        pool: The pool.
        live: Its Service as it is in the cluster; None: not known yet.
        node_address: An address of a node that runs the gateway, for a Service of type NodePort.
    """
    external = pool.spec.networking.external
    given = [external.hostname] if external.hostname and external.enabled is not False else []
    kind = service_type(pool)
    if kind is ServiceType.LOAD_BALANCER:
        ingress = ((live or {}).get("status", {}).get("loadBalancer", {}).get("ingress")) or []
        return given + [host for entry in ingress if (host := entry.get("hostname") or entry.get("ip"))]
    if kind is ServiceType.NODE_PORT and node_address:
        return [*given, node_address]
    return given


def endpoint_of(pool: Pool, live: Doc | None, hosts: Sequence[str]) -> str:
    """The gatewayEndpoint that callers get.

    For a Service of type NodePort, the host is a node, and the port is the one that the Service has on all nodes.

    Args:
        pool: The pool.
        live: Its Service as it is in the cluster; None: not known yet.
        hosts: What `outside_hosts` returned. The first one counts.
    """
    port = service_port(pool)
    if not hosts:
        return f"tcp://{pool.key.name}.{pool.key.namespace}.svc:{port}"
    if service_type(pool) is ServiceType.NODE_PORT:
        ports = (live or {}).get("spec", {}).get("ports") or [{}]
        port = ports[0].get("nodePort") or port
    host = hosts[0]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def node_address(pods: Iterable[Doc], before: str | None) -> str | None:
    """An address of a node that runs the gateway: the same as before, if that node still does."""
    found = sorted(
        {pod["status"]["hostIP"] for pod in pods if pod.get("status", {}).get("hostIP") and _is_ready(pod)}
    )
    return before if before in found else next(iter(found), before)


def _is_ready(pod: Doc) -> bool:
    conditions = pod["status"].get("conditions", ())
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]
