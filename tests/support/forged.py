"""Certificates that no library makes: a valid one is changed byte by byte and signed again.

They are for the gateway's hostile clients. The module knows only the parts of DER (X.690) that it needs: elements,
subjects and signatures.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

SEQUENCE, SET = 0x30, 0x31
BIT_STRING, UTF8, PRINTABLE, BMP = 0x03, 0x0C, 0x13, 0x1E  # X.680 table 1
COMMON_NAME = bytes.fromhex("0603550403")
ORGANIZATION = bytes.fromhex("060355040a")
ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")  # RFC 5758 section 3.2
ECDSA_SHA1 = bytes.fromhex("300906072a8648ce3d0401")


def der(tag: int, *parts: bytes) -> bytes:
    """Returns one element of DER."""
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + body


def attribute(value: bytes, tag: int = UTF8, kind: bytes = COMMON_NAME) -> bytes:
    """Returns one attribute of a subject."""
    return der(SEQUENCE, kind, der(tag, value))


def subject(*attributes: bytes) -> bytes:
    """Returns a subject with one set for each attribute, which is the usual form."""
    return der(SEQUENCE, *(der(SET, attribute) for attribute in attributes))


def forged(
    certificate: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    changes: dict[bytes, bytes],
    algorithm: bytes = ECDSA_SHA256,
) -> bytes:
    """Returns the certificate with these changes and a new signature, in DER.

    Args:
        certificate: A certificate that is signed with ECDSA and SHA-256.
        signer: The key that signs the changed certificate.
        changes: New bytes by the old bytes that they replace. The lengths of outer elements are not adjusted, except
            that of the outermost.
        algorithm: The signature's algorithm, as the certificate names it.
    """
    changed = _body(certificate.tbs_certificate_bytes)
    for old, new in (changes | {ECDSA_SHA256: algorithm}).items():
        assert old in changed
        changed = changed.replace(old, new)
    to_be_signed = der(SEQUENCE, changed)
    digest = hashes.SHA1() if algorithm == ECDSA_SHA1 else hashes.SHA256()
    signature = signer.sign(to_be_signed, ec.ECDSA(digest))
    return der(SEQUENCE, to_be_signed, algorithm, der(BIT_STRING, b"\0", signature))


def subject_of(certificate: x509.Certificate) -> bytes:
    """Returns its subject in DER."""
    return certificate.subject.public_bytes(Encoding.DER)


def _body(element: bytes) -> bytes:
    lengths = element[1] & 0x7F if element[1] & 0x80 else 0
    return element[2 + lengths :]
