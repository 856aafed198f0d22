"""The token of a client certificate: only bkpool's own client certificates with exactly one token are accepted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core import tokens
from bkpool.core.errors import Unauthenticated
from bkpool.gateway.session.certificate import token_digest, token_in_name

TOKEN = tokens.derive(b"key", "uid", "allocation")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def uri(token):
    return x509.UniformResourceIdentifier(f"buildkit://allocation/{token}")


@given(st.text(ALPHABET, min_size=43, max_size=43))
def test_every_token_in_a_name_is_read(token):
    assert token_in_name(f"alloc:{token}") == token


@given(st.text(max_size=70) | st.text(max_size=70).map("alloc:".__add__))
def test_another_name_has_no_token(name):
    found = token_in_name(name)
    assert found is None or (name == f"alloc:{found}" and tokens.well_formed(found))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "alloc:",
        TOKEN,
        f"ALLOC:{TOKEN}",
        f" alloc:{TOKEN}",
        f"alloc:{TOKEN} ",
        f"alloc:{TOKEN}\n",
        f"alloc:{TOKEN}A",
        f"alloc:{TOKEN[:-1]}",
        f"alloc:alloc:{TOKEN}",
        f"alloc:{TOKEN[:-1]}\0",
        f"alloc:{TOKEN[:-1]}é",
    ],
)
def test_a_name_that_only_looks_like_a_lease_has_no_token(name):
    assert token_in_name(name) is None


def test_the_token_of_a_certificate_is_read(ca, now):
    assert token_digest(ca.client(TOKEN).der, now) == tokens.digest(TOKEN)
    assert token_digest(ca.client(TOKEN, alternative=(uri(TOKEN),)).der, now) == tokens.digest(TOKEN)
    assert token_digest(ca.client(TOKEN, alternative=(x509.DNSName("job.example"),)).der, now) == tokens.digest(TOKEN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ca: ca.issue(), "its subject contains no lease token"),
        (lambda ca: ca.issue(f"alloc:{TOKEN}", f"alloc:{TOKEN}"), "its subject contains no lease token"),
        (lambda ca: ca.client(TOKEN, alternative=(uri("x" * 43),)), "contain different tokens"),
        (lambda ca: ca.client(TOKEN, alternative=(uri(TOKEN), uri("x" * 43))), "contain different tokens"),
        (lambda ca: ca.client(TOKEN, usage=None), "it is not for TLS clients"),
        (lambda ca: ca.client(TOKEN, usage=ExtendedKeyUsageOID.SERVER_AUTH), "it is not for TLS clients"),
        (lambda ca: ca.client(TOKEN, usage=ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE), "it is not for TLS"),
    ],
)
def test_a_certificate_of_our_ca_for_another_purpose_is_refused(ca, now, make, message):
    with pytest.raises(Unauthenticated) as caught:
        token_digest(make(ca).der, now)
    assert message in caught.value.message
    assert caught.value.code == "WrongCertificate"
    assert TOKEN not in caught.value.message


@given(st.binary(max_size=200))
def test_bytes_that_are_not_a_certificate_are_refused(data):
    with pytest.raises(Unauthenticated):
        token_digest(data, datetime(2026, 1, 1, tzinfo=UTC))


def test_the_dates_are_exact_to_the_second(ca, now):
    der = ca.client(TOKEN, begins=now, ends=now + timedelta(hours=1)).der
    second = timedelta(seconds=1)
    assert token_digest(der, now) == tokens.digest(TOKEN)
    assert token_digest(der, now + timedelta(hours=1)) == tokens.digest(TOKEN)
    for moment, code in [
        (now - second, "CertificateNotYetValid"),
        (now + timedelta(hours=1, seconds=1), "CertificateExpired"),
    ]:
        with pytest.raises(Unauthenticated) as caught:
            token_digest(der, moment)
        assert caught.value.code == code
