"""Reads the token of a lease from a client certificate, if bkpool issued the certificate for a client.

TLS has verified the certificate's chain before. The dates and everything else are checked here. Nothing here knows
which leases exist.
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

_ALLOCATE = "Run `bkpool allocate` and use the certificate that it returns."
_SUBJECT = "alloc:"
_URI = "buildkit://allocation/"
_CACHED_CERTIFICATES = 1024
"""buildx makes a connection for every command, and to parse the certificate takes a tenth of its time."""

# For a common name of a wrong length, cryptography only warns. None of our certificates has one, so it is an error.
warnings.filterwarnings("error", message="Attribute's length must be")


@dataclass(frozen=True, slots=True)
class _Credential:
    token_sha256: str
    not_before: datetime
    not_after: datetime


def token_digest(der: bytes | None, now: datetime) -> str:
    """Returns the SHA-256 of the token in a client's certificate.

    Args:
        der: The certificate, already verified by TLS; None if the client sent none.
        now: The time against which its dates are checked.

    Raises:
        Unauthenticated: There is no certificate, it is not valid now, or bkpool did not issue it for a client.
    """
    if der is None:
        raise Unauthenticated("this gateway needs a client certificate", hint=_ALLOCATE, code="NoCertificate")
    credential = _read(der)
    _check_dates(credential, now)
    return credential.token_sha256


@lru_cache(_CACHED_CERTIFICATES)
def _read(der: bytes) -> _Credential:
    try:
        certificate = x509.load_der_x509_certificate(der)
        _check_usage(certificate)
        digest = tokens.digest(_token_in(certificate))
        return _Credential(digest, certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    except BkpoolError:
        raise
    except Exception as error:  # cryptography parses lazily and raises many kinds of errors
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
        raise _wrong("its subject contains no lease token")
    try:
        others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return token
    if any(uri != _URI + token for uri in others.get_values_for_type(x509.UniformResourceIdentifier)):
        raise _wrong("its subject and its alternative name contain different tokens")
    return token


def _subject(common_name: str) -> bytes:
    """Returns the subject as bkpool's CA encodes it: this common name only, in one of DER's many string types."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]).public_bytes()


def token_in_name(common_name: str) -> str | None:
    """Returns the token of a common name `alloc:<token>`, or None if the name has another form."""
    token = common_name.removeprefix(_SUBJECT)
    return token if token != common_name and tokens.well_formed(token) else None


def _check_dates(credential: _Credential, now: datetime) -> None:
    not_before, not_after = credential.not_before, credential.not_after
    if now < not_before:
        raise Unauthenticated(
            f"the client certificate is not valid before {not_before:%Y-%m-%d %H:%M:%S} UTC",
            hint="Set the clock of this machine or of the gateway's machine.",
            code="CertificateNotYetValid",
        )
    if now > not_after:
        raise Unauthenticated(
            f"the client certificate expired at {not_after:%Y-%m-%d %H:%M:%S} UTC",
            hint="Run `bkpool allocate` again.",
            code="CertificateExpired",
        )


def _wrong(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"the client certificate does not belong to a lease: {why}",
        hint=_ALLOCATE,
        code="WrongCertificate",
    )
