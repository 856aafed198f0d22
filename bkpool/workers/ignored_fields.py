"""Which fields of a pool's spec nothing reads, depending on where workers and gateways run.

Each set has paths below `spec`; everything below a path counts as well.
"""

from __future__ import annotations

from bkpool.core.ignored import OTHER_RESOURCES

_POOL_GATEWAY_FIELDS = (
    "gatewayImage",
    "networking.serviceType",
    "networking.port",
    "networking.annotations",
    "networking.allowedCIDRs",
    "networking.external",
    "gateway.replicas",
    "gateway.resources",
    "gateway.serviceType",
    "gateway.port",
    "gateway.nodePort",
    "gateway.loadBalancerClass",
)
"""These need gateways that run as pods."""

IGNORED_IN_CLUSTER = frozenset({"auth.methods[].token.file", "networking.hostPorts", "security.netRaw"})
"""Workers are pods, which have a loopback of their own, and each pool has gateways that run as pods. A user who may
create a pool in the cluster may not name files on the appliance's machine. Nothing takes CAP_NET_RAW from steps in
pods."""

IGNORED_WITH_HOST_GATEWAY = frozenset((*IGNORED_IN_CLUSTER, *_POOL_GATEWAY_FIELDS))
"""Workers are pods, and the gateway runs outside the cluster."""

IGNORED_BY_PROCESSES = frozenset(
    (*_POOL_GATEWAY_FIELDS, OTHER_RESOURCES, "buildkitImage", "auth.methods[].token.secretRef")
)
"""Workers are processes. A local cache (`cache.backends`) is not in this set: every slot keeps its cache anyway."""

IGNORED_IN_HOST_NETWORK = frozenset((*IGNORED_BY_PROCESSES, "networking.egress", "networking.hostPorts"))
"""Workers are processes that use the network of the machine as it is."""
