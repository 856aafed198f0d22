from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bkpool.core.errors import InvalidInput
from bkpool.core.names import Key
from bkpool.pki.authority import Authority, renewal_due
from bkpool.pki.names import gateway_names, parse_host, pool_named

NOW = datetime.now(UTC)
CA = Authority.create(NOW)
LABELS = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


def test_a_gateway_has_the_names_of_loopback_its_host_its_pools_and_the_user():
    names = gateway_names("Builder-7", [Key("ci", "amd64")], ["GW.example.com", "192.0.2.7", "2001:DB8::7"])

    assert names.dns == (
        "localhost",
        "builder-7",
        "amd64",
        "amd64.ci",
        "amd64.ci.svc",
        "amd64.ci.svc.cluster.local",
        "gw.example.com",
    )
    assert names.ips == tuple(map(ip_address, ("127.0.0.1", "::1", "192.0.2.7", "2001:db8::7")))


def test_each_name_appears_once():
    names = gateway_names("localhost", [Key("default", "p"), Key("other", "p")], ["localhost", "127.0.0.1", "p"])
    assert len(set(names.dns)) == len(names.dns)
    assert len(set(names.ips)) == len(names.ips) == 2


@pytest.mark.parametrize("hostname", ["", "my_machine", "a" * 64, "büro", "1234", "-x"])
def test_a_hostname_that_is_not_a_dns_name_is_left_out(hostname):
    assert gateway_names(hostname, []).dns == ("localhost",)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "gw:1235", "https://gw", "[::1]", "fe80::1%eth0", "1.2.3", "1.2.3.256", "a..b", ".a", "a.", "-a",
        "a_b", "*.example.com", "büro.example", "a" * 64, ".".join(["a" * 60] * 5), "a b", "10.0.0.0/8", "a\0",
    ],
)  # fmt: skip
def test_an_invalid_host_is_an_error_that_names_where_it_was_given(text):
    with pytest.raises(InvalidInput, match="--gateway-host") as refused:
        gateway_names("h", [], [text], "--gateway-host")
    assert refused.value.field == "--gateway-host"


@given(
    st.one_of(
        st.text(max_size=80), st.lists(LABELS, min_size=1, max_size=5).map(".".join), st.ip_addresses().map(str)
    )
)
@example("x" * 63 + ".example")
@example("٣.example")
@example("1.2.3.4.example")
def test_every_accepted_host_is_in_the_certificate(text):
    try:
        names = gateway_names("h", [], [text])
    except InvalidInput:
        return
    leaf = CA.issue_server(names.dns, names.ips, NOW, NOW + timedelta(days=300))
    assert not renewal_due(leaf.cert_pem, NOW, names.dns, names.ips)


@given(st.ip_addresses())
def test_every_address_is_parsed_unchanged(address):
    assert parse_host(str(address), "--gateway-host") == address


@pytest.mark.parametrize(
    "pool", [Key("default", "p"), Key("team-a", "svc"), Key("svc", "cluster"), Key("a" * 63, "9")]
)
def test_a_pool_is_found_by_the_full_names_of_its_service(pool):
    assert [pool_named(name) for name in gateway_names("", [pool]).dns[-2:]] == [pool, pool]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "p",
        "p.default",
        "localhost",
        "10.0.0.1",
        "::1",
        "svc",
        ".svc",
        "p.svc",
        "a.b.c.svc",
        "p.d.svc..",
        "p.d.sv\u0441",
    ],
)
def test_no_other_name_finds_a_pool(name):
    assert pool_named(name) is None
