"""Certificates, as OpenSSL reads and verifies them."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core import tokens
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.pki import authority as module
from bkpool.pki.authority import Authority, key_belongs_to, renew_at, renewal_due

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
TOKEN = tokens.derive(b"k" * 32, "uid", "lease")
LOOPBACK = (ip_address("127.0.0.1"), ip_address("::1"))


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority.create(NOW)


def parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def value(pem: bytes, kind):
    return parsed(pem).extensions.get_extension_for_class(kind)


def openssl(*args: str, stdin: bytes = b"") -> str:
    done = subprocess.run(["openssl", *args], input=stdin, capture_output=True, check=False)
    return (done.stdout + done.stderr).decode()


def verified(tmp_path, ca: Authority, leaf: bytes, *options: str) -> str:
    (tmp_path / "ca.crt").write_bytes(ca.cert_pem)
    (tmp_path / "leaf.crt").write_bytes(leaf)
    return openssl(
        "verify", "-x509_strict", "-CAfile", str(tmp_path / "ca.crt"), *options, str(tmp_path / "leaf.crt")
    )


# --- the root -------------------------------------------------------------------------------------------------------


def test_the_root_signs_only_leaves_and_is_valid_for_ten_years(ca):
    cert = parsed(ca.cert_pem)
    constraints = value(ca.cert_pem, x509.BasicConstraints)
    usage = value(ca.cert_pem, x509.KeyUsage)

    assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(ca=True, path_length=0))
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    assert isinstance(cert.public_key().curve, ec.SECP256R1)
    assert cert.not_valid_after_utc == NOW + timedelta(days=3650) == ca.not_after
    assert cert.not_valid_before_utc == NOW - DAY


def test_a_replica_whose_clock_is_a_day_behind_still_knows_its_workers(ca, tmp_path):
    later = NOW + timedelta(days=100)
    for leaf in (ca.issue_worker("u1", later), ca.issue_dialler("c", later, later + 3 * DAY)):
        assert parsed(leaf.cert_pem).not_valid_before_utc == later - DAY
    young = ca.derived("a pool").issue_worker("u2", NOW)
    assert parsed(young.cert_pem).not_valid_before_utc == NOW - DAY


def test_two_cas_have_different_names_and_do_not_accept_each_others_certificates(ca):
    other = Authority.create(NOW)
    leaf = other.issue_client(TOKEN, NOW, NOW + DAY)

    assert parsed(other.cert_pem).subject != parsed(ca.cert_pem).subject
    assert other.issued(leaf.cert_pem)
    assert not ca.issued(leaf.cert_pem)
    assert not ca.issued(b"nonsense")


def test_a_ca_that_is_read_back_is_the_same(ca):
    again = Authority(ca.cert_pem, ca.key_pem)
    assert ca.issued(again.issue_client(TOKEN, NOW, NOW + DAY).cert_pem)


def test_a_certificate_that_is_no_ca_or_has_another_key_is_refused(ca):
    other = Authority.create(NOW)
    leaf = ca.issue_server(["localhost"], [], NOW, NOW + DAY)
    encrypted = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    for cert, key, says in (
        (ca.cert_pem, other.key_pem, "does not belong"),
        (leaf.cert_pem, leaf.key_pem, "not a CA certificate"),
        (b"", ca.key_pem, "the certificate is not readable"),
        (ca.cert_pem, b"-----BEGIN PRIVATE KEY-----", "the key is not readable"),
        (ca.cert_pem, encrypted, "the key is not readable"),
    ):
        with pytest.raises(ValueError, match=says):
            Authority(cert, key)


# --- client certificates --------------------------------------------------------------------------------------------


def test_openssl_shows_the_token_in_the_subject_and_the_san(ca):
    leaf = ca.issue_client(TOKEN, NOW, NOW + DAY)

    assert openssl("x509", "-noout", "-subject", stdin=leaf.cert_pem).strip() == f"subject=CN = alloc:{TOKEN}"
    shown = openssl("x509", "-noout", "-ext", "subjectAltName", stdin=leaf.cert_pem)
    assert f"URI:buildkit://allocation/{TOKEN}" in shown


def test_a_client_certificate_can_be_used_by_clients_only(ca, tmp_path):
    leaf = ca.issue_client(TOKEN, NOW, NOW + DAY).cert_pem

    assert verified(tmp_path, ca, leaf, "-purpose", "sslclient").endswith("OK\n")
    assert "unsuitable certificate purpose" in verified(tmp_path, ca, leaf, "-purpose", "sslserver")
    assert "verification failed" in verified(tmp_path, Authority.create(NOW), leaf, "-purpose", "sslclient")
    assert list(value(leaf, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    constraints = value(leaf, x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)


def test_a_client_certificate_is_valid_for_its_lease_and_five_minutes_before(ca):
    cert = parsed(ca.issue_client(TOKEN, NOW + DAY, NOW + 2 * DAY).cert_pem)
    assert cert.not_valid_before_utc == NOW + DAY - timedelta(minutes=5)
    assert cert.not_valid_after_utc == NOW + 2 * DAY


def test_the_new_key_belongs_to_the_certificate_and_differs_each_time(ca):
    one, two = (ca.issue_client(TOKEN, NOW, NOW + DAY) for _ in range(2))
    assert key_belongs_to(one.cert_pem, one.key_pem)
    assert not key_belongs_to(one.cert_pem, two.key_pem)
    assert one.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_the_leaf_names_the_key_of_its_ca(ca):
    leaf = ca.issue_client(TOKEN, NOW, NOW + DAY).cert_pem
    assert (
        value(leaf, x509.AuthorityKeyIdentifier).value.key_identifier
        == value(ca.cert_pem, x509.SubjectKeyIdentifier).value.digest
    )


def test_serials_have_128_random_bits_and_are_never_negative_in_der(ca):
    serials = [parsed(ca.issue_client(TOKEN, NOW, NOW + DAY).cert_pem).serial_number for _ in range(64)]
    assert len(set(serials)) == 64
    assert all(0 < serial < 2**128 for serial in serials)
    assert any(serial >= 2**127 for serial in serials), "the highest bit is random as well"
    assert any(serial < 2**127 for serial in serials)


@given(
    before=st.timedeltas(-DAY, timedelta(days=4000)), life=st.timedeltas(timedelta(seconds=1), timedelta(days=8000))
)
def test_no_leaf_expires_after_its_ca(before, life):
    ca = _SHARED
    root = parsed(ca.cert_pem)
    if NOW + before - module.BACK_DATED >= ca.not_after or NOW + before + life <= root.not_valid_before_utc:
        with pytest.raises(HostFault, match="certificate authority expired"):
            ca.issue_client(TOKEN, NOW + before, NOW + before + life)
    else:
        cert = parsed(ca.issue_client(TOKEN, NOW + before, NOW + before + life).cert_pem)
        assert root.not_valid_before_utc <= cert.not_valid_before_utc
        assert cert.not_valid_before_utc <= cert.not_valid_after_utc <= root.not_valid_after_utc


_SHARED = Authority.create(NOW)


# --- certificate requests -------------------------------------------------------------------------------------------


def request_for(key) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alloc:somebody-else")])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("evil.example")]), critical=False)
        .sign(key, algorithm)
        .public_bytes(serialization.Encoding.PEM)
    )


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-256", "P-384", "Ed25519", "RSA-2048"],
)
def test_only_the_key_of_a_request_is_used(ca, tmp_path, key):
    leaf = ca.issue_client(TOKEN, NOW, NOW + DAY, request_for(key))

    assert leaf.key_pem is None
    assert parsed(leaf.cert_pem).public_key() == key.public_key()
    assert parsed(leaf.cert_pem).subject.rfc4514_string() == f"CN=alloc:{TOKEN}"
    assert not value(leaf.cert_pem, x509.BasicConstraints).value.ca
    names = value(leaf.cert_pem, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == []
    assert verified(tmp_path, ca, leaf.cert_pem, "-purpose", "sslclient").endswith("OK\n")


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        dsa.generate_private_key(1024),
    ],
    ids=["RSA-1024", "P-521", "secp256k1", "DSA"],
)
def test_weak_or_odd_keys_are_refused(ca, key):
    with pytest.raises(InvalidInput, match="csr: it has a key that is not") as refused:
        ca.issue_client(TOKEN, NOW, NOW + DAY, request_for(key))
    assert refused.value.field == "csr"


def test_a_request_that_is_signed_with_another_key_is_refused(ca):
    der = bytearray(x509.load_pem_x509_csr(request_for(ec.generate_private_key(ec.SECP256R1()))).public_bytes(_DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)

    with pytest.raises(InvalidInput, match="not signed with its own key"):
        ca.issue_client(TOKEN, NOW, NOW + DAY, forged)


_DER = serialization.Encoding.DER


@given(st.binary(max_size=300))
def test_a_malformed_request_is_refused(junk):
    framed = b"-----BEGIN CERTIFICATE REQUEST-----\n" + junk + b"\n-----END CERTIFICATE REQUEST-----\n"
    for pem in (junk, framed):
        with pytest.raises(InvalidInput, match="csr: ") as refused:
            module.key_of_request(pem)
        assert refused.value.field == "csr"


def test_a_request_that_is_too_long_is_refused():
    with pytest.raises(InvalidInput, match="longer than 16384"):
        module.key_of_request(b"x" * 20_000)


# --- server certificates --------------------------------------------------------------------------------------------


def test_a_server_certificate_is_valid_for_its_names_and_for_servers_only(ca, tmp_path):
    leaf = ca.issue_server(["localhost", "gw.example"], LOOPBACK, NOW, NOW + DAY).cert_pem

    def purpose(*more: str) -> str:
        return verified(tmp_path, ca, leaf, "-purpose", "sslserver", *more)

    assert purpose("-verify_hostname", "gw.example").endswith("OK\n")
    assert purpose("-verify_ip", "::1").endswith("OK\n")
    assert "hostname mismatch" in purpose("-verify_hostname", "other.example")
    assert "unsuitable certificate purpose" in verified(tmp_path, ca, leaf, "-purpose", "sslclient")


def test_a_real_handshake_with_both_certificates_succeeds(ca, tmp_path):
    def context(purpose: ssl.Purpose, leaf) -> ssl.SSLContext:
        pair = tmp_path / purpose.name
        pair.write_bytes(leaf.cert_pem + leaf.key_pem)
        made = ssl.create_default_context(purpose, cadata=ca.cert_pem.decode())
        made.load_cert_chain(pair)
        made.verify_mode = ssl.CERT_REQUIRED
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        return made

    server = context(ssl.Purpose.CLIENT_AUTH, ca.issue_server(["localhost"], LOOPBACK, NOW, NOW + DAY))
    client = context(ssl.Purpose.SERVER_AUTH, ca.issue_client(TOKEN, NOW, NOW + DAY))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with server.wrap_socket(theirs, server_side=True) as tls:
            tls.sendall(dict(tls.getpeercert()["subject"][0])["commonName"].encode())

    thread = threading.Thread(target=serve)
    thread.start()
    with client.wrap_socket(ours, server_hostname="127.0.0.1") as tls:
        assert tls.recv(100).decode() == f"alloc:{TOKEN}"
    thread.join()


def test_a_server_certificate_is_due_thirty_days_before_it_expires(ca):
    leaf = ca.issue_server(["localhost"], LOOPBACK, NOW, NOW + timedelta(days=365)).cert_pem
    due = NOW + timedelta(days=335)

    assert renew_at(leaf) == due
    assert not renewal_due(leaf, due - timedelta(seconds=1), ["localhost"], LOOPBACK)
    assert renewal_due(leaf, due, ["localhost"], LOOPBACK)


def test_a_server_certificate_is_due_when_its_names_differ(ca):
    leaf = ca.issue_server(["localhost", "a"], LOOPBACK, NOW, NOW + timedelta(days=365)).cert_pem

    assert not renewal_due(leaf, NOW, ["a", "localhost"], reversed(LOOPBACK))
    assert renewal_due(leaf, NOW, ["localhost"], LOOPBACK)
    assert renewal_due(leaf, NOW, ["localhost", "a", "b"], LOOPBACK)
    assert renewal_due(leaf, NOW, ["localhost", "a"], LOOPBACK[:1])
    assert renewal_due(ca.cert_pem, NOW, ["localhost"], LOOPBACK), "a certificate without names"
