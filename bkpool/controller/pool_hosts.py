"""Which names a pool's gateway may have in its certificate, and which host callers outside of the cluster get.

Pure: a pool, its Service and what the operator allows go in. A name that is not allowed never comes out of
`certificate_names`, whoever gave it.
"""

from __future__ import annotations

from bkpool.controller.pool_service import outside_hosts
from bkpool.core.allowances import Allowances, may_name_a_service, permitted
from bkpool.core.pool import Pool
from bkpool.kube import Doc
from bkpool.pki.authority import has_name
from bkpool.pki.names import CertificateNames, gateway_names, is_address


def certificate_names(pool: Pool, allowed: Allowances, live: Doc | None, node: str | None) -> CertificateNames:
    """The names for the gateway's certificate: its own Service's, and the hosts that are allowed.

    The name of a load balancer counts only if it cannot be the name of a Service.

    Args:
        pool: The pool.
        allowed: What its operator allows.
        live: Its Service as it is in the cluster; None: not known yet.
        node: An address of a node that runs the gateway, for a Service of type NodePort.
    """
    wanted = permitted(pool, allowed)
    own = wanted.spec.networking.external.hostname
    hosts = [
        host
        for host in outside_hosts(wanted, live, node)
        if host == own or is_address(host) or not may_name_a_service(host)
    ]
    return gateway_names("localhost", [pool.key], hosts, "spec.networking.external.hostname")


def reachable_hosts(pool: Pool, live: Doc | None, node: str | None, certificate: bytes) -> list[str]:
    """The hosts that the pool asks for and that its gateway's certificate is for, the preferred one first."""
    return [host for host in outside_hosts(pool, live, node) if has_name(certificate, host)]
