"""What the pods of a pool may reach: the NetworkPolicy for `spec.networking.egress`.

Pure, like pod_spec. It has an effect only if the cluster's network plugin enforces NetworkPolicies, which nothing
here can know. Policies are additive: another policy for the same pods can allow more, never less.
"""

from __future__ import annotations

from ipaddress import ip_network

from bkpool.core.egress import NOT_PUBLIC_4, NOT_PUBLIC_6
from bkpool.core.names import LABEL_MANAGED, LABEL_POOL, LABEL_PURPOSE, MANAGER, PURPOSE_WORKER, Key
from bkpool.core.pool import Egress, Pool
from bkpool.kube import Doc
from bkpool.workers.pods.pod_spec import labelled

_NOT_PUBLIC = {"0.0.0.0/0": NOT_PUBLIC_4, "::/0": NOT_PUBLIC_6}

# The cluster's DNS with the labels of kubeadm, kind and the clouds; and the default address of NodeLocal DNSCache,
# which is on each node and not in a pod: https://kubernetes.io/docs/tasks/administer-cluster/nodelocaldns/
_DNS: Doc = {
    "to": [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        },
        {"ipBlock": {"cidr": "169.254.20.10/32"}},
    ],
    "ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")],
}


def egress_key(pool: Pool) -> Key:
    """The name of the pool's policy."""
    return Key(pool.key.namespace, f"{pool.key.name}-egress")


def egress_policy(pool: Pool) -> Doc | None:
    """The policy for the pool's workers; None: they may reach everything."""
    policy = pool.spec.egress
    if policy is Egress.OPEN:
        return None
    allowed: list[Doc] = [
        {"cidr": str(ip_network(cidr, strict=False))} for cidr in pool.spec.networking.egress.allowed_cidrs
    ]
    if policy is Egress.PUBLIC:
        allowed += [{"cidr": all_of, "except": list(private)} for all_of, private in _NOT_PUBLIC.items()]
    rules = [_DNS, *([{"to": [{"ipBlock": block} for block in allowed]}] if allowed else [])]
    selected = {LABEL_MANAGED: MANAGER, LABEL_POOL: pool.key.name, LABEL_PURPOSE: PURPOSE_WORKER}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": labelled(egress_key(pool), pool),
        "spec": {"podSelector": {"matchLabels": selected}, "policyTypes": ["Egress"], "egress": rules},
    }
