"""What a client's certificate says: the token of its lease, if the certificate is one that we issue for clients.

TLS has verified its chain before; the dates and everything else are judged here. Nothing here knows which leases
there are.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bkpool.core import tokens
from bkpool.core.errors import Unauthenticated

_ALLOCATE = "Run `bkpool allocate` and use the certificate that it gives."
_SUBJECT = "alloc:"
_URI = "buildkit://allocation/"


def token_of(der: bytes | None, now: datetime) -> str:
    """The token in a client's certificate.

    Raises:
        Unauthenticated: There is no certificate, or it is not one of ours for a client at this time.
    """
    if der is None:
        raise Unauthenticated("this gateway needs a client certificate", hint=_ALLOCATE, code="NoCertificate")
    try:
        certificate = x509.load_der_x509_certificate(der)
        _check_usage(certificate)
        token = _token_in(certificate)
        _check_dates(certificate, now)
    except ValueError as error:  # whatever cryptography finds malformed, early or late: it parses lazily
        raise _wrong("it cannot be read") from error
    return token


def _check_usage(certificate: x509.Certificate) -> None:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        raise _wrong("it is not for TLS clients") from None
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise _wrong("it is not for TLS clients")


def _token_in(certificate: x509.Certificate) -> str:
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    token = token_in_name(names[0]) if len(names) == 1 else None
    if token is None:
        raise _wrong("its subject names no lease")
    try:
        others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return token
    if any(uri != _URI + token for uri in others.get_values_for_type(x509.UniformResourceIdentifier)):
        raise _wrong("its subject and its alternative name are of different leases")
    return token


def token_in_name(common_name: str) -> str | None:
    """The token in a subject's CN `alloc:<token>`, or None if that is not what it is."""
    token = common_name.removeprefix(_SUBJECT)
    return token if token != common_name and tokens.well_formed(token) else None


def _check_dates(certificate: x509.Certificate, now: datetime) -> None:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
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
