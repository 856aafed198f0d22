"""The key and the request of a client, as cryptography makes them and as OpenSSL reads them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bkpool.cli import keys
from bkpool.pki.authority import key_of_request


@pytest.fixture(params=range(20))
def made(request) -> tuple[bytes, x509.CertificateSigningRequest, ec.EllipticCurvePrivateKey]:
    """Several, because numbers with leading zeros and signatures of several lengths must be right as well."""
    pem, csr = keys.make()
    private = serialization.load_pem_private_key(pem, password=None)
    return pem, x509.load_pem_x509_csr(csr.encode()), private


def test_the_key_is_the_one_that_cryptography_would_have_written(made):
    pem, _, private = made
    assert private.curve.name == "secp256r1"
    assert pem == private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_the_request_is_the_one_that_cryptography_would_have_made(made):
    _, csr, private = made
    theirs = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(private, hashes.SHA256())
    assert csr.tbs_certrequest_bytes == theirs.tbs_certrequest_bytes
    assert csr.signature_algorithm_oid == theirs.signature_algorithm_oid
    assert csr.public_key() == private.public_key()
    assert csr.is_signature_valid


@pytest.mark.parametrize("value", [1, 2**200, 2**255])
def test_a_key_with_leading_zeros(monkeypatch, value):
    private = ec.derive_private_key(value, ec.SECP256R1())
    monkeypatch.setattr(ec, "generate_private_key", lambda _curve: private)
    pem, csr = keys.make()
    assert serialization.load_pem_private_key(pem, password=None).private_numbers() == private.private_numbers()
    assert key_of_request(csr.encode()) == private.public_key()


def test_openssl_accepts_both(tmp_path):
    pem, csr = keys.make()
    (tmp_path / "key").write_bytes(pem)
    (tmp_path / "csr").write_text(csr)
    for arguments in (["pkey", "-check", "-noout", "-in", "key"], ["req", "-verify", "-noout", "-in", "csr"]):
        done = subprocess.run(["openssl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_no_key_needs_what_cryptography_has_for_x509():
    code = "import sys; from bkpool.cli import allocate, build, keys; keys.make(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "cryptography.hazmat.primitives.asymmetric.ec" in loaded
    assert "cryptography.x509" not in loaded
    assert "cryptography.hazmat.primitives.serialization" not in loaded
