"""The rules of a worker's network, and what they are made from."""

from __future__ import annotations

import subprocess

import pytest

from bkpool.core.errors import WorkerFailed
from bkpool.core.pool import PoolSpec
from bkpool.workers.processes import network
from bkpool.workers.processes.worker_init import NAMESERVER
from bkpool.workers.processes.worker_init.host_facts import (
    host_rules,
    local_networks,
    nameservers,
    outer_interface,
    worker_resolv_conf,
)


def spec(**networking: object) -> PoolSpec:
    return PoolSpec.model_validate({"networking": networking})


def lines(rules: str) -> list[str]:
    """The rules of the chain, each as `<networks> <verdict>`."""
    chain = [line.strip() for line in rules.splitlines() if " daddr " in line]
    return [line.replace(" with icmpx admin-prohibited", "") for line in chain]


HOST_FIRST = [
    "ip daddr 127.0.0.0/8 reject",
    "ip6 daddr { ::1, ::ffff:0:0/96 } reject",
    "ip daddr @host4 reject",
    "ip6 daddr @host6 reject",
]


def test_whatever_the_policy_is_the_host_comes_first():
    everything = {"policy": "listed", "allowedCIDRs": ["0.0.0.0/0", "127.0.0.1/32"]}
    for given in ({}, {"egress": {"policy": "public"}}, {"egress": everything}):
        assert lines(network.rules(spec(**given)))[:4] == HOST_FIRST


def test_an_open_pool_reaches_all_but_link_local_multicast_and_metadata():
    ipv4, ipv6 = lines(network.rules(spec()))[4:]
    assert ipv4.endswith("reject")
    assert "169.254.0.0/16" in ipv4
    assert "224.0.0.0/4" in ipv4
    assert "fd00:ec2::254" in ipv6


def test_a_metadata_service_is_open_only_where_exactly_it_is_listed():
    assert "ip daddr { 169.254.169.254/32 } accept" in lines(
        network.rules(spec(egress={"allowedCIDRs": ["169.254.169.254/32"]}))
    )
    wide = lines(network.rules(spec(egress={"policy": "listed", "allowedCIDRs": ["0.0.0.0/0"]})))[4:]
    assert wide[0].endswith("reject")  # the metadata services come before what is allowed
    assert wide[2:] == ["ip daddr { 0.0.0.0/0 } accept", "ip daddr { 0.0.0.0/0 } reject", "ip6 daddr { ::/0 } reject"]


def test_an_untrusted_pool_reaches_public_networks_and_what_is_listed():
    untrusted = PoolSpec.model_validate(
        {"untrusted": True, "networking": {"egress": {"allowedCIDRs": ["10.1.0.0/16", "fd01::/64"]}}}
    )
    rules = lines(network.rules(untrusted))
    allowed, private = rules.index("ip daddr { 10.1.0.0/16 } accept"), len(rules) - 2
    assert allowed < private
    assert "10.0.0.0/8" in rules[private]
    assert rules[private].endswith("reject")
    assert "ip6 daddr { fd01::/64 } accept" in rules


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"egress": {"policy": "public"}},
        {"egress": {"policy": "listed", "allowedCIDRs": ["10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"]}},
    ],
)
def test_nft_understands_the_rules(given):
    text = network.rules(spec(**given)) + host_rules(["192.0.2.1/32", "172.17.0.0/16"], ["fe80::1/128"])
    checked = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "nft", "-f", "-"],
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_port_of_bkpool_itself_is_refused():
    assert network.host_ports(spec(hostPorts=[5000, 5000, 80]), {8082}) == [80, 5000]
    with pytest.raises(WorkerFailed, match=r"spec.networking.hostPorts: bkpool itself uses 8082") as refused:
        network.host_ports(spec(hostPorts=[5000, 8082]), {8082, 1235})
    assert refused.value.field == "spec.networking.hostPorts"


def test_proxies_on_loopback_that_a_worker_cannot_reach_are_found():
    proxies = [
        "http://127.0.0.1:3128",
        "localhost:3129",
        "http://proxy.example.com:80",
        "https://[::1]",
        "http://x:y",
        "http://[::1",
    ]
    assert network.unreachable_proxies(spec(), proxies) == [443, 3128, 3129]
    assert network.unreachable_proxies(spec(hostPorts=[3128, 3129, 443]), proxies) == []


FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
        +-- 192.0.2.0/24 2 0 2
           |-- 192.0.2.0
              /24 link UNICAST
           |-- 192.0.2.7
              /32 host LOCAL
           |-- 192.0.2.255
              /32 link BROADCAST
           |-- 127.0.0.1
              /32 host LOCAL
Local:
           |-- 192.0.2.7
              /32 host LOCAL
"""
IF_INET6 = """\
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""


def test_the_addresses_of_the_host_are_read_from_the_kernel():
    assert local_networks(FIB_TRIE, IF_INET6, "") == (["192.0.2.7/32"], ["fe80::fc:ff:fe00:1/128"])
    assert local_networks("", "", "") == ([], [])


LOCAL_ROUTES = """\
Local:
     |-- 198.51.100.0
        /32 link BROADCAST
        /32 host LOCAL
     |-- 198.51.100.128
        /25 host LOCAL
     |-- 198.51.100.200
        /32 host LOCAL
     |-- 127.0.0.0
        /8 host LOCAL
"""


def ipv6_route(network: str, length: str, flags: str) -> str:
    return f"{network} {length} {'0' * 32} 00 {'0' * 32} 00000400 00000003 00000000 {flags} lo\n"


def test_networks_that_a_route_makes_the_hosts_are_the_hosts():
    routes = (
        ipv6_route("fd770077" + "0" * 24, "40", "80000001")  # a local route
        + ipv6_route("fd000000" + "0" * 24, "80", "00300001")  # anycast, of a router
        + ipv6_route("fc000000" + "0" * 24, "40", "00000001")  # an ordinary one
        + ipv6_route("0" * 32, "00", "80000001")  # local for what a proxy marks, and not for all
        + ipv6_route("0" * 31 + "1", "80", "80200001")
    )
    assert local_networks(LOCAL_ROUTES, "", routes) == (
        ["198.51.100.0/32", "198.51.100.128/25"],
        ["fd00::/128", "fd77:77::/64"],
    )


ROUTE = """\
Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0
wlan0 00000000 010200C0 0003 0 0 600 00000000 0 0 0
"""
IPV6_DEFAULT = " ".join(["0" * 32, "00", "0" * 32, "00", "0" * 32, "00000400", "00000001", "0", "00000003", "eth6"])
IPV6_NONE = " ".join(["0" * 32, "00", "0" * 32, "00", "0" * 32, "ffffffff", "00000001", "0", "00200200", "lo"])


def test_the_interface_of_the_default_route_connects_the_worker():
    assert outer_interface(ROUTE, "") == ("wlan0", True)
    assert outer_interface("header", IPV6_DEFAULT) == ("eth6", True)
    assert outer_interface("".join(ROUTE.splitlines(keepends=True)[:2]), IPV6_NONE) == ("docker0", False)
    assert outer_interface("", IPV6_NONE) is None


def test_the_worker_asks_the_relay_and_searches_where_the_host_searches():
    text = "# by hand\nsearch corp.example.com\nnameserver 127.0.0.53\noptions edns0 trust-ad\n"
    assert nameservers(text) == ["127.0.0.53"]
    assert worker_resolv_conf(text) == (f"nameserver {NAMESERVER}\nsearch corp.example.com\noptions edns0 trust-ad\n")
    assert nameservers("") == ["127.0.0.1"]
