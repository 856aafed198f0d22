"""The contents of Secrets: read back completely, or an error that names the Secret and the key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import EXIT, HostFault
from bkpool.core.names import Key
from bkpool.pki.authority import AUTHORITY_LIFE, Authority, expires_at, renew_at
from bkpool.pki.bundle import (
    ClusterSecrets,
    api_authority_data,
    api_authority_of,
    bundle_fits,
    bundle_renew_at,
    gateway_bundle,
)
from bkpool.pki.names import gateway_names

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
NAMES = gateway_names("", [Key("default", "p")])
SOURCE = "Secret buildkit-system/bkpool-pki"


@pytest.fixture(scope="module")
def secrets():
    return ClusterSecrets.create(NOW)


@pytest.fixture(scope="module")
def bundle(secrets):
    return gateway_bundle(secrets, NAMES, "default/p", NOW)


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
    assert sorted(bundle) == ["backend-ca.crt", "backend.crt", "backend.key", "ca.crt", "tls.crt", "tls.key"]
    assert bundle_fits(bundle, secrets, NAMES, NOW)
    assert secrets.authority.key_pem not in bundle.values()
    assert secrets.backend.key_pem not in bundle.values()


def test_a_bundle_is_due_a_month_before_its_first_certificate_expires(bundle, secrets):
    due = bundle_renew_at(bundle)
    assert due == NOW + timedelta(days=335)
    assert bundle_fits(bundle, secrets, NAMES, due - timedelta(seconds=1))
    assert not bundle_fits(bundle, secrets, NAMES, due)
    short = secrets.backend.issue_dialler("default/p", NOW, NOW + 100 * DAY)
    assert bundle_renew_at(bundle | {"backend.crt": short.cert_pem}) == renew_at(short.cert_pem) == NOW + 70 * DAY


def test_both_certificates_of_a_bundle_have_the_life_that_is_asked_for(secrets):
    bundle = gateway_bundle(secrets, NAMES, "default/p", NOW, 9 * DAY)
    for name in ("tls.crt", "backend.crt"):
        assert expires_at(bundle[name]) == NOW + 9 * DAY
    assert NOW + 5.9 * DAY < bundle_renew_at(bundle) < NOW + 6 * DAY, "in the last third"
    assert bundle_fits(bundle, secrets, NAMES, NOW)


@pytest.mark.parametrize("authority", ["authority", "backend"])
def test_a_certificate_capped_by_its_cas_expiry_is_not_renewed_in_a_loop(authority, secrets):
    ends = NOW + 10 * DAY
    old = Authority.create(ends - AUTHORITY_LIFE)
    parts = {"authority": secrets.authority, "backend": secrets.backend, "token_key": b"k" * 32, authority: old}
    waning = ClusterSecrets(**parts)
    bundle = gateway_bundle(waning, NAMES, "default/p", NOW)
    assert bundle_renew_at(bundle) == ends
    assert bundle_fits(bundle, waning, NAMES, NOW)


def test_an_incomplete_bundle_or_one_of_another_ca_does_not_fit(bundle, secrets):
    other = gateway_bundle(ClusterSecrets.create(NOW), NAMES, "default/p", NOW)
    for key in bundle:
        assert not bundle_fits(bundle | {key: other[key]}, secrets, NAMES, NOW), key
        assert not bundle_fits(bundle | {key: b"nonsense"}, secrets, NAMES, NOW), key
        assert not bundle_fits({k: v for k, v in bundle.items() if k != key}, secrets, NAMES, NOW), key
    assert not bundle_fits(other, secrets, NAMES, NOW)


def test_a_bundle_for_other_names_does_not_fit(bundle, secrets):
    assert not bundle_fits(bundle, secrets, gateway_names("", [Key("default", "p")], ["b.example.com"]), NOW)


def test_the_api_has_a_ca_of_its_own_that_no_gateway_is_trusted_by(secrets):
    data = api_authority_data(NOW)
    authority = api_authority_of(data, secrets, SOURCE)
    gateway = gateway_bundle(secrets, NAMES, "default/p", NOW)
    assert not authority.issued(gateway["tls.crt"])
    assert not authority.issued(gateway["backend.crt"])
    for wrong in ({}, {**data, "ca.key": b"nonsense"}, {**data, "ca.crt": secrets.authority.cert_pem}):
        with pytest.raises(HostFault, match=SOURCE):
            api_authority_of(wrong, secrets, SOURCE)
    same = {"ca.crt": secrets.authority.cert_pem, "ca.key": secrets.authority.key_pem}
    with pytest.raises(HostFault, match="another CA"):
        api_authority_of(same, secrets, SOURCE)
