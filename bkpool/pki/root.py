"""Makes the self-signed certificate of a CA: with a new key, or with the key of one pool's CA.

The second kind is made from the same input again and again, and is the same to the last byte. Nothing is stored here.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_LONGEST_NAME = 64  # characters of a common name (RFC 5280 appendix A, ub-common-name); longer ones are cut
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The order of the group of P-256 (SEC 2, 2.4.2). A private key is a number from 1 to one less."""
_SEED_BYTES = 48  # 128 bits more than a key, so that the remainder is as good as random (NIST SP 800-56A 5.6.1.2.1)
_SERIAL_BYTES = 16


def root_certificate(
    key: ec.EllipticCurvePrivateKey,
    name: x509.Name,
    serial: int,
    begin: datetime,
    end: datetime,
    *,
    repeatable: bool = False,
) -> bytes:
    """The certificate of a root CA that signs leaf certificates, but no other CA.

    Args:
        key: Its key.
        name: Its subject and issuer.
        serial: Its serial number.
        begin: When its validity begins.
        end: When it expires.
        repeatable: Whether the same arguments give the same bytes (RFC 6979).
    """
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256(), ecdsa_deterministic=repeatable).public_bytes(Encoding.PEM)


def derived_root(
    master: ec.EllipticCurvePrivateKey, label: str, name: str, begin: datetime, end: datetime
) -> tuple[bytes, bytes]:
    """A root CA whose key follows from another key. Whoever has it learns nothing of the other key (RFC 5869).

    Args:
        master: The other key, of P-256.
        label: What the CA is for. Each label gives another key.
        name: The beginning of its subject. Eight hex digits of the label's key follow.
        begin: When its validity begins.
        end: When it expires.

    Returns:
        Its certificate and its key, in PEM.
    """
    secret = master.private_numbers().private_value.to_bytes(32)
    seed = HKDF(hashes.SHA256(), _SEED_BYTES + _SERIAL_BYTES, salt=None, info=label.encode()).derive(secret)
    key = ec.derive_private_key(int.from_bytes(seed[:_SEED_BYTES]) % (_ORDER - 1) + 1, ec.SECP256R1())
    serial = int.from_bytes(seed[_SEED_BYTES:]) or 1
    digits = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    cert = root_certificate(key, subject(f"{name} {digits}"), serial, begin, end, repeatable=True)
    return cert, private_pem(key)


def subject(common_name: str) -> x509.Name:
    """A name that has only a common name, which is cut if it is too long."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_LONGEST_NAME])])


def key_usage(*, authority: bool) -> x509.KeyUsage:
    """What the key of a CA, or of a leaf certificate, may be used for."""
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS #8 in PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
