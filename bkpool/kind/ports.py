"""The host ports through which workers in a kind cluster are reached. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bkpool.core.errors import HostFault
from bkpool.kind.engine import Node, PortMappings

WORKER_PORTS = range(12400, 12800)
"""The range of host ports for workers. kind-config.yaml takes the first 32; a second cluster takes others."""


def worker_ports(mappings: PortMappings) -> tuple[int, ...]:
    """The ports of a node that workers can use: within WORKER_PORTS, and the same number on both sides."""
    return tuple(sorted(port for port, (_, host) in mappings.items() if port == host and port in WORKER_PORTS))


def entry_node(name: str, nodes: Sequence[Node], where: str) -> Node:
    """The node of a cluster through which workers are reached.

    Args:
        name: The cluster's name, for the message.
        nodes: Its nodes.
        where: What gave the name, for the message.

    Raises:
        HostFault: `NoWorkerPorts`: the cluster was not created from kind-config.yaml.
    """
    for node in nodes:
        if worker_ports(node.ports):
            return node
    raise HostFault(
        f"{where}: the kind cluster {name!r} has no host ports for workers: it was not created from kind-config.yaml",
        hint=f"Use --cluster with another name. If you need nothing in it, run `kind delete cluster --name {name}` "
        "instead, and bkpool creates it again.",
        code="NoWorkerPorts",
    )
