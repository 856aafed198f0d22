"""A route from this machine to the pods of a kind cluster, for an appliance that runs outside the cluster.

It never changes the cluster, and it removes only a route that it added.
"""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from harness import eventually
from worlds import Pods

NODE_TIMEOUT = 60.0
"""Seconds until the node must have its subnet of pods. The controller manager gives it after the node is ready."""


@contextmanager
def routed_pods(world: Pods) -> Iterator[str]:
    """Makes this machine reach pods at their own addresses until the end of the block. Yields the pods' subnet.

    A new node has no subnet yet: a node is ready when its network plugin is, and the plugin of `e2e/airgap` does not
    need the subnet.
    """

    def subnet_and_address() -> tuple[str, str] | None:
        (node,) = world.objects("nodes")
        subnet = node["spec"].get("podCIDR")
        addresses = (a["address"] for a in node["status"].get("addresses", []) if a["type"] == "InternalIP")
        address = next(addresses, None)
        return (subnet, address) if subnet and address else None

    subnet, address = eventually(subnet_and_address, "the node has a podCIDR and an InternalIP", NODE_TIMEOUT)
    route = (subnet, "via", address)
    done = subprocess.run(["ip", "route", "add", *route], check=False, capture_output=True, text=True)
    added = done.returncode == 0
    try:
        pod = str(ipaddress.ip_network(subnet)[1])
        found = subprocess.run(["ip", "route", "get", pod], check=False, capture_output=True, text=True).stdout
        # A run that was killed leaves its route, which may lead to a node that is gone.
        assert f" via {address} " in found, f"no pod can be reached: {found or done.stderr}"
        yield subnet
    finally:
        if added:
            subprocess.run(["ip", "route", "del", *route], check=False)
