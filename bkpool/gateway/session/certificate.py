"""What a client's certificate says: the token of its lease, if the certificate is one that we issue for clients.

TLS has verified its chain before; the dates and everything else are judged here. Nothing here knows which leases
there are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bkpool.core import tokens
from bkpool.core.errors import BkpoolError, Unauthenticated

_ALLOCATE = "Run `bkpool allocate` and use the certificate that it gives."
_SUBJECT = "alloc:"
_URI = "buildkit://allocation/"
_REMEMBERED = 1024  # certificates: buildx makes a connection for every command, and parsing takes a tenth of it

# A common name of a wrong length is only warned of; no certificate of ours has one, and the log is not for it.
warnings.filterwarnings("error", message="Attribute's length must be")


@dataclass(frozen=True, slots=True)
class _Credential:
    token_sha256: str
    begins: datetime
    ends: datetime


def credential_of(der: bytes | None, now: datetime) -> str:
    """The SHA-256 of the token in a client's certificate.

    Raises:
        Unauthenticated: There is no certificate, or it is not one of ours for a client at this time.
    """
    if der is None:
        raise Unauthenticated("this gateway needs a client certificate", hint=_ALLOCATE, code="NoCertificate")
    credential = _read(der)
    _check_dates(credential, now)
    return credential.token_sha256


@lru_cache(_REMEMBERED)
def _read(der: bytes) -> _Credential:
    try:
        certificate = x509.load_der_x509_certificate(der)
        _check_usage(certificate)
        digest = tokens.digest(_token_in(certificate))
        return _Credential(digest, certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    except BkpoolError:
        raise
    except Exception as error:  # whatever cryptography makes of it, early or late: it parses lazily
        raise _wrong("it cannot be read") from error


def _check_usage(certificate: x509.Certificate) -> None:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        raise _wrong("it is not for TLS clients") from None
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise _wrong("it is not for TLS clients")


def _token_in(certificate: x509.Certificate) -> str:
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    token = token_in_name(names[0]) if names else None
    if token is None or certificate.subject.public_bytes() != _subject(names[0]):
        raise _wrong("its subject names no lease")
    try:
        others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return token
    if any(uri != _URI + token for uri in others.get_values_for_type(x509.UniformResourceIdentifier)):
        raise _wrong("its subject and its alternative name are of different leases")
    return token


def _subject(common_name: str) -> bytes:
    """As our CA writes it: with this name alone, and of DER's dozen kinds of strings in ours."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]).public_bytes()


def token_in_name(common_name: str) -> str | None:
    """The token in a subject's CN `alloc:<token>`, or None if that is not what it is."""
    token = common_name.removeprefix(_SUBJECT)
    return token if token != common_name and tokens.well_formed(token) else None


def _check_dates(credential: _Credential, now: datetime) -> None:
    begins, ends = credential.begins, credential.ends
    if now < begins:
        raise Unauthenticated(
            f"the client certificate is not valid before {begins:%Y-%m-%d %H:%M:%S} UTC",
            hint="Correct the clock of this machine or of the gateway's.",
            code="CertificateNotYetValid",
        )
    if now > ends:
        raise Unauthenticated(
            f"the client certificate expired at {ends:%Y-%m-%d %H:%M:%S} UTC",
            hint="Run `bkpool allocate` again.",
            code="CertificateExpired",
        )


def _wrong(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"the client certificate is not one of a lease: {why}", hint=_ALLOCATE, code="WrongCertificate"
    )
