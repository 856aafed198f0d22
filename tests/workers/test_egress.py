"""What a pool's workers may reach: judged as a network plugin would, address by address."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.names import LABEL_POOL, LABEL_PURPOSE
from bkpool.workers.pods.egress import egress_policy
from bkpool.workers.pods.pod_spec import PodRequest
from bkpool.workers.pods.pod_spec import pod as pod_of
from support.objects import pool, slot


def egress(policy=None, *cidrs, untrusted=False):
    return pool(untrusted=untrusted, networking={"egress": {"policy": policy, "allowedCIDRs": cidrs}})


def reaches(document, address, port=443):
    """Whether the policy lets somebody through, by ipBlocks alone."""
    address = ip_address(address)
    for rule in document["spec"]["egress"]:
        if port not in [entry["port"] for entry in rule.get("ports", [{"port": port}])]:
            continue
        for block in [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]:
            outside = any(address in ip_network(private) for private in block.get("except", ()))
            if address in ip_network(block["cidr"]) and not outside:
                return True
    return False


def test_an_untrusted_pool_reaches_what_is_public_and_others_everything():
    assert egress_policy(egress()) is None
    assert egress_policy(egress("open", untrusted=True)) is None
    assert egress_policy(egress(untrusted=True)) == egress_policy(egress("public", untrusted=True))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *[(a, True) for a in ("1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "11.0.0.1", "2606:4700::1111")],
        *[
            (a, False)
            for a in ("10.96.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "127.0.0.1")
        ],
        *[(a, False) for a in ("169.254.169.254", "169.254.20.10", "0.0.0.0", "224.0.0.1", "255.255.255.255")],
        *[(a, False) for a in ("::1", "::", "fd00::1", "fe80::1", "fec0::1", "ff02::1", "fd00:ec2::254")],
        *[(a, False) for a in ("::ffff:10.0.0.1", "::10.0.0.1", "2002:a00:1::", "64:ff9b:1::a00:1")],
    ],
)
def test_public_is_everything_but_private_and_link_local_networks(address, public):
    assert reaches(egress_policy(egress("public")), address) is public
    assert not reaches(egress_policy(egress("listed")), address)


@given(st.ip_addresses())
def test_nothing_private_is_public(address):
    if reaches(egress_policy(egress("public")), address):
        assert not address.is_private
        assert not address.is_link_local
        assert not address.is_multicast


@pytest.mark.parametrize("policy", ["public", "listed"])
def test_what_is_listed_is_reached_and_names_are_resolved(policy):
    document = egress_policy(egress(policy, "10.1.2.3/24", "fd00:1::/64"))
    assert [reaches(document, a) for a in ("10.1.2.200", "fd00:1::5", "10.1.3.1", "fd00:2::5")] == [1, 1, 0, 0]
    dns = document["spec"]["egress"][0]
    assert [(entry["protocol"], entry["port"]) for entry in dns["ports"]] == [("UDP", 53), ("TCP", 53)]
    assert dns["to"][0] == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    assert [reaches(document, "169.254.20.10", port) for port in (53, 80)] == [True, False]


def test_it_selects_the_pools_pods_and_ends_with_the_pool():
    document = egress_policy(egress("listed"))
    labels = pod_of(PodRequest(slot(0), "uid", None, egress(), "an/image"))["metadata"]["labels"]
    selected = document["spec"]["podSelector"]["matchLabels"]
    assert selected.items() <= labels.items()
    assert {LABEL_POOL, LABEL_PURPOSE} <= selected.keys()
    assert document["spec"]["policyTypes"] == ["Egress"]
    assert document["metadata"]["ownerReferences"][0]["uid"] == "pool-uid"
    assert document["metadata"]["name"] not in {"p-workers", "p-gateway"}, "the ingress policies of a cluster"
