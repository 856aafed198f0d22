"""The contents of Secrets: read back completely, or an error that names the Secret and the key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import EXIT, HostFault
from bkpool.core.names import Key
from bkpool.pki.authority import AUTHORITY_LIFE, Authority, expires_at
from bkpool.pki.bundle import (
    ClusterSecrets,
    api_authority_data,
    api_authority_of,
    bundle_renew_at,
    diallers_fit,
    gateway_diallers,
    gateway_server,
    server_fits,
)
from bkpool.pki.names import gateway_names
from bkpool.pki.pool_authority import DIALLER_LIFE, PoolAuthorities

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
POOL = Key("default", "p")
NAMES = gateway_names("", [POOL])
SOURCE = "Secret buildkit-system/bkpool-pki"


@pytest.fixture(scope="module")
def secrets():
    return ClusterSecrets.create(NOW)


def made(secrets, former=None, life=365 * DAY):
    pool = PoolAuthorities(secrets.backend).current(POOL)
    return gateway_server(secrets.authority, NAMES, NOW, life) | gateway_diallers(pool, former, "default/p", NOW)


def fits(bundle, secrets, names=NAMES, now=NOW, former=None):
    pool = PoolAuthorities(secrets.backend).current(POOL)
    return server_fits(bundle, secrets.authority, names, now) and diallers_fit(bundle, pool, former, now)


@pytest.fixture(scope="module")
def bundle(secrets):
    return made(secrets)


def test_secrets_are_read_back_unchanged(secrets):
    data = secrets.to_data()
    assert sorted(data) == ["backend-ca.crt", "backend-ca.key", "ca.crt", "ca.key", "token.key"]
    assert ClusterSecrets.of_data(data).to_data() == data
    assert "PRIVATE" not in repr(secrets)
    assert repr(secrets.token_key) not in repr(secrets)


def test_a_missing_or_damaged_key_is_named_and_never_replaced(secrets):
    data, other = secrets.to_data(), ClusterSecrets.create(NOW).to_data()
    cases = [({key: None}, f"{key} is missing") for key in data]
    cases += [({key: b""}, f"{key} is missing") for key in data]
    cases += [
        ({"ca.crt": b"nonsense"}, "ca.crt and ca.key cannot be used: the certificate is not readable"),
        ({"ca.key": other["ca.key"]}, "ca.crt and ca.key cannot be used: the key does not belong"),
        (
            {"backend-ca.key": other["backend-ca.key"]},
            "backend-ca.crt and backend-ca.key cannot be used: the key does",
        ),
        ({"token.key": b"short"}, "token.key has 5 bytes instead of 32"),
        (
            {"backend-ca.crt": data["ca.crt"], "backend-ca.key": data["ca.key"]},
            "ca.key and backend-ca.key are the same",
        ),
    ]
    for changes, says in cases:
        damaged = {key: value for key, value in (data | changes).items() if value is not None}
        with pytest.raises(HostFault) as caught:
            ClusterSecrets.of_data(damaged, SOURCE)
        assert caught.value.message.startswith(f"{SOURCE}: {says}")
        assert caught.value.exit_code == EXIT["Unreadable"]


def test_a_bundle_has_everything_that_a_gateway_needs(bundle, secrets):
    assert sorted(bundle) == ["ca.crt", "dialler.crt", "dialler.key", "tls.crt", "tls.key", "worker-ca.crt"]
    assert fits(bundle, secrets)
    assert secrets.authority.key_pem not in bundle.values()
    assert secrets.backend.key_pem not in bundle.values()
    assert secrets.backend.cert_pem not in bundle.values(), "it would open the workers of every pool"


def test_certificates_for_workers_are_short_and_renewed_a_day_before_they_expire(bundle, secrets):
    assert expires_at(bundle["dialler.crt"]) == NOW + DIALLER_LIFE
    due = bundle_renew_at(bundle)
    assert NOW + 1.6 * DAY < due < NOW + 2 * DAY
    assert fits(bundle, secrets, now=due - timedelta(seconds=1))
    assert not fits(bundle, secrets, now=due)
    assert server_fits(bundle, secrets.authority, NAMES, due), "that of the gateway itself is not due then"


def test_the_certificate_for_clients_has_the_life_that_is_asked_for(secrets):
    bundle = made(secrets, life=9 * DAY)
    assert expires_at(bundle["tls.crt"]) == NOW + 9 * DAY
    assert fits(bundle, secrets)


@pytest.mark.parametrize("authority", ["authority", "backend"])
def test_a_certificate_capped_by_its_cas_expiry_is_not_renewed_in_a_loop(authority, secrets):
    ends = NOW + DAY
    old = Authority.create(ends - AUTHORITY_LIFE)
    parts = {"authority": secrets.authority, "backend": secrets.backend, "token_key": b"k" * 32, authority: old}
    waning = ClusterSecrets(**parts)
    bundle = made(waning)
    assert bundle_renew_at(bundle) == ends
    assert fits(bundle, waning)


def test_an_incomplete_bundle_or_one_of_another_ca_does_not_fit(bundle, secrets):
    other = made(ClusterSecrets.create(NOW))
    for key in bundle:
        assert not fits(bundle | {key: other[key]}, secrets), key
        assert not fits(bundle | {key: b"nonsense"}, secrets), key
        assert not fits({k: v for k, v in bundle.items() if k != key}, secrets), key
    assert not fits(other, secrets)


def test_a_bundle_for_other_names_does_not_fit(bundle, secrets):
    other = gateway_names("", [POOL], ["b.example.com"])
    assert not fits(bundle, secrets, names=other)
    assert fits(bundle, secrets, names=None)


def test_workers_of_a_former_ca_can_be_reached_as_long_as_there_are_any(bundle, secrets):
    both = made(secrets, former=secrets.backend)
    assert {"backend-ca.crt", "backend.crt", "backend.key"} == both.keys() - bundle.keys(), (
        "older gateways read these"
    )
    assert fits(both, secrets, former=secrets.backend)
    assert not fits(bundle, secrets, former=secrets.backend)
    assert not fits(both, secrets, former=None), "it opens more than is needed"


def test_the_api_has_a_ca_of_its_own_that_no_gateway_is_trusted_by(secrets):
    data = api_authority_data(NOW)
    authority = api_authority_of(data, secrets, SOURCE)
    gateway = made(secrets)
    assert not authority.issued(gateway["tls.crt"])
    assert not authority.issued(gateway["dialler.crt"])
    for wrong in ({}, {**data, "ca.key": b"nonsense"}, {**data, "ca.crt": secrets.authority.cert_pem}):
        with pytest.raises(HostFault, match=SOURCE):
            api_authority_of(wrong, secrets, SOURCE)
    same = {"ca.crt": secrets.authority.cert_pem, "ca.key": secrets.authority.key_pem}
    with pytest.raises(HostFault, match="another CA"):
        api_authority_of(same, secrets, SOURCE)
