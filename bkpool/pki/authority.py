"""The certificate authority and its leaves, bytes in and bytes out (RFC 5280).

It touches no file and reads no clock; where things are kept is keep.py's. A leaf never outlives its authority, and
never has a use beyond the one it is for.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.pki.names import IP

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=365)
RENEW_BEFORE = timedelta(days=30)
"""Server certificates live a year and are renewed a month before they end: the Go contract's defaults."""

BACK_DATED = timedelta(minutes=5)
"""How much earlier than now a certificate is valid: the clocks of a CI runner and of the gateway may differ, and
five minutes is what Kerberos has always allowed (RFC 4120 section 8.2)."""

_SERIAL_BYTES = 16  # 128 random bits; RFC 5280 4.1.2.2 allows 20 octets, the DER sign octet included
_LONGEST_NAME = 64  # characters of a common name (RFC 5280 appendix A, ub-common-name); a SAN has it whole
_LONGEST_CSR = 16 * 1024  # bytes: an RSA-8192 request with every usual extension is under 4 KiB
_RSA_BITS = range(2048, 8193)  # beyond, checking one signature takes milliseconds of everybody's time

E = TypeVar("E", bound=x509.ExtensionType)
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate, and its key in PKCS #8 unless the caller has kept that; both PEM."""

    cert_pem: bytes
    key_pem: bytes | None


class Authority:
    """A root that issues leaves directly.

    Args:
        cert_pem: Its certificate.
        key_pem: Its private key, unencrypted PKCS #8.

    Raises:
        ValueError: One of them is not what it should be, or the two do not belong together.
    """

    def __init__(self, cert_pem: bytes, key_pem: bytes) -> None:
        self.cert_pem = cert_pem
        self.key_pem = key_pem
        self._cert = _certificate(cert_pem)
        self._key = _private_key(key_pem)
        if self._key.public_key() != self._cert.public_key():
            raise ValueError("the key does not belong to the certificate")
        constraints = _extension(self._cert, x509.BasicConstraints)
        if constraints is None or not constraints.ca:
            raise ValueError("the certificate is not an authority's")
        self._key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())

    @classmethod
    def create(cls, now: datetime, *, name: str = "bkpool CA") -> Self:
        """A new root with a fresh P-256 key, valid ten years; it can sign leaves, not other authorities.

        Args:
            now: From when it is valid, less BACK_DATED.
            name: What its subject begins with; eight random hex digits follow, so that two can be told apart.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(f"{name} {secrets.token_hex(4)}")
        cert = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(_serial())
            .not_valid_before(now - BACK_DATED)
            .not_valid_after(now + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(cert.public_bytes(Encoding.PEM), _pem(key))

    @property
    def not_after(self) -> datetime:
        """When the authority, and with it every leaf, ends."""
        return self._cert.not_valid_after_utc

    def issue_client(
        self, token: str, not_before: datetime, not_after: datetime, csr_pem: bytes | None = None
    ) -> Leaf:
        """The certificate of a lease: the token is in its subject and in a URI, for the gateway to route by.

        Args:
            token: The lease's token.
            not_before: From when it must be valid; the certificate says somewhat earlier (BACK_DATED).
            not_after: When it ends at the latest.
            csr_pem: A PKCS #10 request whose public key is taken, and nothing else. Without it, a fresh P-256 key.

        Raises:
            InvalidInput: The request is not one, its signature is wrong, or its key too weak; `field` is "csr".
            HostFault: `AuthorityExpired`.
        """
        key = None if csr_pem is not None else ec.generate_private_key(ec.SECP256R1())
        public = key.public_key() if key else key_of_request(csr_pem or b"")
        names = [x509.UniformResourceIdentifier(f"buildkit://allocation/{token}")]
        use = ExtendedKeyUsageOID.CLIENT_AUTH
        cert = self._issue(f"alloc:{token}", public, names, use, not_before=not_before, not_after=not_after)
        return Leaf(cert, _pem(key) if key else None)

    def issue_server(
        self, dns_names: Iterable[str], ips: Iterable[IP], not_before: datetime, not_after: datetime
    ) -> Leaf:
        """The certificate of a gateway, for these names and addresses and no client's use.

        Raises:
            HostFault: `AuthorityExpired`.
        """
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns_names]
        names += [x509.IPAddress(ip) for ip in ips]
        return self._leaf("bkpool gateway", names, ExtendedKeyUsageOID.SERVER_AUTH, not_before, not_after)

    def issue_worker(self, worker_uid: str, now: datetime) -> Leaf:
        """The certificate of a worker, by which its gateway knows it and no client is.

        It runs to the authority's end: this identity ends with the uid, which nobody has a second time, and not with
        time; so nothing in a running pod has to be renewed.

        Args:
            worker_uid: The uid of the worker object, in the certificate's only alternative name (`worker_uri`).
            now: From when it is valid, less BACK_DATED.

        Raises:
            HostFault: `AuthorityExpired`.
        """
        names = [x509.UniformResourceIdentifier(worker_uri(worker_uid))]
        return self._leaf(f"bkpool worker {worker_uid}", names, ExtendedKeyUsageOID.SERVER_AUTH, now, self.not_after)

    def issue_dialler(self, name: str, now: datetime, not_after: datetime) -> Leaf:
        """The certificate with which a gateway or a controller comes to a worker; it is no server's.

        Args:
            name: Who dials, in ASCII; in the alternative name `buildkit://gateway/<name>`.
            now: From when it is valid, less BACK_DATED.
            not_after: When it ends at the latest.

        Raises:
            HostFault: `AuthorityExpired`.
        """
        names = [x509.UniformResourceIdentifier(f"buildkit://gateway/{name}")]
        return self._leaf(f"bkpool dialler {name}", names, ExtendedKeyUsageOID.CLIENT_AUTH, now, not_after)

    def issued(self, cert_pem: bytes) -> bool:
        """Whether this authority has signed that certificate."""
        try:
            _certificate(cert_pem).verify_directly_issued_by(self._cert)
        except Exception:  # noqa: BLE001 - whatever is wrong with it (format, issuer, signature), it is not ours
            return False
        return True

    def _leaf(
        self,
        common_name: str,
        names: Iterable[x509.GeneralName],
        use: x509.ObjectIdentifier,
        not_before: datetime,
        not_after: datetime,
    ) -> Leaf:
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._issue(common_name, key.public_key(), names, use, not_before=not_before, not_after=not_after)
        return Leaf(cert, _pem(key))

    def _issue(
        self,
        common_name: str,
        public: PublicKey,
        names: Iterable[x509.GeneralName],
        use: x509.ObjectIdentifier,
        *,
        not_before: datetime,
        not_after: datetime,
    ) -> bytes:
        begin = max(not_before - BACK_DATED, self._cert.not_valid_before_utc)
        end = min(not_after, self.not_after)
        if not begin < end:
            raise HostFault(
                f"The certificate authority has ended ({self.not_after:%Y-%m-%d %H:%M} UTC)",
                hint="Stop the appliance, move its pki directory away and start again: clients then need new leases.",
                code="AuthorityExpired",
            )
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(common_name))
            .issuer_name(self._cert.subject)
            .public_key(public)
            .serial_number(_serial())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(self._key_id, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def worker_uri(worker_uid: str) -> str:
    """The name of a worker in its certificate."""
    return f"buildkit://worker/{worker_uid}"


def key_of_request(csr_pem: bytes) -> PublicKey:
    """The public key of a certificate request, whose sender has shown that the private one is his.

    Raises:
        InvalidInput: See Authority.issue_client.
    """
    if len(csr_pem) > _LONGEST_CSR:
        raise _bad_request(f"is longer than {_LONGEST_CSR} bytes")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = _strong(request.public_key())
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm):
        raise _bad_request("is not a certificate request in PEM") from None
    if not signed:
        raise _bad_request("is not signed with its own key")
    return key


def key_belongs_to(cert_pem: bytes, key_pem: bytes) -> bool:
    """Whether this is the certificate's key.

    Raises:
        ValueError: One of them is not what it should be.
    """
    return _private_key(key_pem).public_key() == _certificate(cert_pem).public_key()


def expires_at(cert_pem: bytes) -> datetime:
    """When a certificate ends.

    Raises:
        ValueError: It is no certificate.
    """
    return _certificate(cert_pem).not_valid_after_utc


def renew_at(cert_pem: bytes) -> datetime:
    """When a server certificate is to be renewed.

    Raises:
        ValueError: It is no certificate.
    """
    return expires_at(cert_pem) - RENEW_BEFORE


def renewal_due(cert_pem: bytes, now: datetime, dns_names: Iterable[str], ips: Iterable[IP]) -> bool:
    """Whether a server certificate should be replaced: it ends soon, or is not for exactly these names.

    Raises:
        ValueError: It is no certificate.
    """
    return now >= renew_at(cert_pem) or not is_for_names(cert_pem, dns_names, ips)


def is_for_names(cert_pem: bytes, dns_names: Iterable[str], ips: Iterable[IP]) -> bool:
    """Whether a server certificate is for exactly these names.

    Raises:
        ValueError: It is no certificate.
    """
    held = _extension(_certificate(cert_pem), x509.SubjectAlternativeName)
    if held is None:
        return False
    return set(dns_names) == set(held.get_values_for_type(x509.DNSName)) and set(ips) == set(
        held.get_values_for_type(x509.IPAddress)
    )


def _strong(key: object) -> PublicKey:
    match key:
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1()) | ed25519.Ed25519PublicKey():
            return key
        case rsa.RSAPublicKey(key_size=bits) if bits in _RSA_BITS:
            return key
        case _:
            raise _bad_request("has a key that is not P-256, P-384, Ed25519 or RSA of 2048 to 8192 bits")


def _bad_request(what: str) -> InvalidInput:
    return InvalidInput(
        f"csr: it {what}",
        hint="Make one with: openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x",
        field="csr",
    )


def _extension(cert: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return cert.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _key_usage(*, authority: bool) -> x509.KeyUsage:
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


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_LONGEST_NAME])])


def _serial() -> int:
    return int.from_bytes(secrets.token_bytes(_SERIAL_BYTES)) or 1


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ValueError("the certificate is not readable") from None


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        raise ValueError("the key is not readable") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not one of an elliptic curve")  # noqa: TRY004 - as any other key we cannot use
    return key
