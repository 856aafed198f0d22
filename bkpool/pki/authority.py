"""The certificate authority (CA) and the leaf certificates that it issues, bytes in and bytes out (RFC 5280).

It touches no file and reads no clock; storage.py stores the files. A leaf never expires after its CA, and it is valid
for one use only (server or client).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Self, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.pki.names import IP, is_address
from bkpool.pki.root import derived_root, key_usage, private_pem, root_certificate, subject

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=365)
RENEW_BEFORE = timedelta(days=30)
"""Server certificates are valid for a year, unless the operator says otherwise, and are renewed a month before they
expire: the defaults of the Go controller."""

BACK_DATED = timedelta(minutes=5)
"""How long before now a certificate becomes valid, because the clocks of a CI runner and of the gateway may differ.
Kerberos allows the same five minutes (RFC 4120 section 8.2)."""
BACK_DATED_INSIDE = timedelta(days=1)
"""The same for CAs, and for workers and those who connect to them. A replica whose clock is set back by hours would
otherwise take every worker that was made meanwhile for a dead one. How old these are decides nothing."""

_SERIAL_BYTES = 16  # 128 random bits; RFC 5280 4.1.2.2 allows 20 bytes, including the sign byte of DER
_LONGEST_CSR = 16 * 1024  # bytes: an RSA-8192 request with all usual extensions has less than 4 KiB
_RSA_BITS = range(2048, 8193)  # with a larger key, checking a signature takes milliseconds, in which all others wait

E = TypeVar("E", bound=x509.ExtensionType)
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate and its key (PKCS #8), both in PEM. No key if the caller sent a certificate request."""

    cert_pem: bytes
    key_pem: bytes | None


@dataclass(frozen=True, slots=True)
class LeafKey:
    """A new key, and what a certificate needs of it."""

    private: ec.EllipticCurvePrivateKey = field(repr=False)
    pem: bytes = field(repr=False)
    digest: x509.SubjectKeyIdentifier

    @classmethod
    def new(cls) -> Self:
        """A new P-256 key."""
        private = ec.generate_private_key(ec.SECP256R1())
        return cls(private, private_pem(private), x509.SubjectKeyIdentifier.from_public_key(private.public_key()))


class Authority:
    """A root CA that issues leaf certificates directly.

    Args:
        cert_pem: The CA's certificate.
        key_pem: The CA's private key, unencrypted PKCS #8.

    Raises:
        ValueError: One of them is not readable, or the key does not belong to the certificate.
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
            raise ValueError("the certificate is not a CA certificate")
        self._key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        self._begin, self._end = self._cert.not_valid_before_utc, self._cert.not_valid_after_utc
        self._drafts: dict[x509.ObjectIdentifier, x509.CertificateBuilder] = {}
        """What all leaves of a use have in common."""

    @classmethod
    def create(cls, now: datetime, *, name: str = "bkpool CA") -> Self:
        """A new root with a new P-256 key, valid for ten years. It can sign leaf certificates, but no other CA.

        Args:
            now: The start of its validity, less BACK_DATED_INSIDE.
            name: The beginning of its subject. Eight random hex digits follow, to distinguish two CAs.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        own = subject(f"{name} {secrets.token_hex(4)}")
        cert = root_certificate(key, own, _serial(), now - BACK_DATED_INSIDE, now + AUTHORITY_LIFE)
        return cls(cert, private_pem(key))

    def derived(self, label: str) -> Authority:
        """Another CA, for what the label says, with the validity of this one. The same label gives the same CA."""
        return Authority(*derived_root(self._key, label, "bkpool backend CA", self._begin, self._end))

    @property
    def mark(self) -> str:
        """Distinguishes CAs: the beginning of its key's SHA-1 identifier (RFC 5280 4.2.1.2), as 16 hex digits."""
        return (self._key_id.key_identifier or b"").hex()[:16]

    @property
    def not_after(self) -> datetime:
        """When the CA expires. Every leaf expires then at the latest."""
        return self._end

    def issue_client(
        self,
        token: str,
        not_before: datetime,
        not_after: datetime,
        csr_pem: bytes | None = None,
        *,
        make_key: Callable[[], LeafKey] = LeafKey.new,
    ) -> Leaf:
        """The client certificate of a lease. Its subject and its URI contain the token, by which the gateway routes.

        Args:
            token: The lease's token.
            not_before: The start of its validity, less BACK_DATED.
            not_after: When it expires at the latest.
            csr_pem: A PKCS #10 request. Only its public key is used.
            make_key: Gives a key that nobody has, if there is no request.

        Raises:
            InvalidInput: The request is malformed, its signature is wrong, or its key is too weak; `field` is "csr".
            HostFault: `AuthorityExpired`.
        """
        names = [x509.UniformResourceIdentifier(f"buildkit://allocation/{token}")]
        use = ExtendedKeyUsageOID.CLIENT_AUTH
        key = make_key() if csr_pem is None else None
        public = key.private.public_key() if key is not None else key_of_request(csr_pem or b"")
        digest = key.digest if key is not None else x509.SubjectKeyIdentifier.from_public_key(public)
        cert = self._issue(f"alloc:{token}", public, digest, names, use, begin=not_before - BACK_DATED, end=not_after)
        return Leaf(cert, key.pem if key is not None else None)

    def issue_server(
        self, dns_names: Iterable[str], ips: Iterable[IP], not_before: datetime, not_after: datetime
    ) -> Leaf:
        """The server certificate of a gateway, for these names and addresses. It cannot be used as a client.

        Raises:
            HostFault: `AuthorityExpired`.
        """
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns_names]
        names += [x509.IPAddress(ip) for ip in ips]
        begin, use = not_before - BACK_DATED, ExtendedKeyUsageOID.SERVER_AUTH
        return self._leaf("bkpool gateway", names, use, begin, not_after)

    def issue_worker(self, worker_uid: str, now: datetime) -> Leaf:
        """The server certificate of a worker, by which its gateway recognizes it. It cannot be used as a client.

        It is valid until the CA expires, so that nothing in a running pod must be renewed. That is safe, because it
        names the worker's uid, and no two workers ever have the same uid.

        Args:
            worker_uid: The uid of the worker object, in the certificate's only alternative name (`worker_uri`).
            now: The start of its validity, less BACK_DATED_INSIDE.

        Raises:
            HostFault: `AuthorityExpired`.
        """
        names = [x509.UniformResourceIdentifier(worker_uri(worker_uid))]
        begin, use = now - BACK_DATED_INSIDE, ExtendedKeyUsageOID.SERVER_AUTH
        return self._leaf(f"bkpool worker {worker_uid}", names, use, begin, self.not_after)

    def issue_dialler(self, name: str, now: datetime, not_after: datetime) -> Leaf:
        """The client certificate with which a gateway or a controller connects to a worker. No server can use it.

        Args:
            name: The name of the gateway or controller, in ASCII; in the alternative name `buildkit://gateway/<name>`.
            now: The start of its validity, less BACK_DATED_INSIDE.
            not_after: When it expires at the latest.

        Raises:
            HostFault: `AuthorityExpired`.
        """
        names = [x509.UniformResourceIdentifier(f"buildkit://gateway/{name}")]
        begin, use = now - BACK_DATED_INSIDE, ExtendedKeyUsageOID.CLIENT_AUTH
        return self._leaf(f"bkpool dialler {name}", names, use, begin, not_after)

    def issued(self, cert_pem: bytes) -> bool:
        """Whether this CA has signed that certificate."""
        try:
            _certificate(cert_pem).verify_directly_issued_by(self._cert)
        except Exception:  # noqa: BLE001 - whatever is wrong (format, issuer, signature), this CA did not sign it
            return False
        return True

    def _leaf(
        self,
        common_name: str,
        names: Iterable[x509.GeneralName],
        use: x509.ObjectIdentifier,
        begin: datetime,
        end: datetime,
    ) -> Leaf:
        key = LeafKey.new()
        public = key.private.public_key()
        cert = self._issue(common_name, public, key.digest, names, use, begin=begin, end=end)
        return Leaf(cert, key.pem)

    def _issue(
        self,
        common_name: str,
        public: PublicKey,
        digest: x509.SubjectKeyIdentifier,
        names: Iterable[x509.GeneralName],
        use: x509.ObjectIdentifier,
        *,
        begin: datetime,
        end: datetime,
    ) -> bytes:
        begin, end = max(begin, self._begin), min(end, self.not_after)
        if not begin < end:
            raise HostFault(
                f"the certificate authority expired at {self.not_after:%Y-%m-%d %H:%M} UTC",
                hint="Stop the appliance, move its pki directory away and start again. Clients then need new leases.",
                code="AuthorityExpired",
            )
        builder = (
            self._draft(use)
            .subject_name(subject(common_name))
            .public_key(public)
            .serial_number(_serial())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(digest, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _draft(self, use: x509.ObjectIdentifier) -> x509.CertificateBuilder:
        """A certificate for this use, without anything of its owner. A builder never changes."""
        if use not in self._drafts:
            self._drafts[use] = (
                x509.CertificateBuilder()
                .issuer_name(self._cert.subject)
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(key_usage(authority=False), critical=True)
                .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
                .add_extension(self._key_id, critical=False)
            )
        return self._drafts[use]


def worker_uri(worker_uid: str) -> str:
    """The URI that names a worker in its certificate."""
    return f"buildkit://worker/{worker_uid}"


def key_of_request(csr_pem: bytes) -> PublicKey:
    """The public key of a certificate request, after checking that the sender has the private key.

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
    """Whether this is the certificate's private key.

    Raises:
        ValueError: One of them is not readable.
    """
    return _private_key(key_pem).public_key() == _certificate(cert_pem).public_key()


def expires_at(cert_pem: bytes) -> datetime:
    """When a certificate expires.

    Raises:
        ValueError: It is not a certificate.
    """
    return _certificate(cert_pem).not_valid_after_utc


def renew_at(cert_pem: bytes) -> datetime:
    """When a server certificate should be renewed: RENEW_BEFORE its end, or in the last third of a short validity.

    Raises:
        ValueError: It is not a certificate.
    """
    certificate = _certificate(cert_pem)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return end - min(RENEW_BEFORE, (end - begin) / 3)


def renewal_due(cert_pem: bytes, now: datetime, dns_names: Iterable[str], ips: Iterable[IP]) -> bool:
    """Whether a server certificate should be replaced: it expires soon, or is not for exactly these names.

    Raises:
        ValueError: It is not a certificate.
    """
    return now >= renew_at(cert_pem) or not is_for_names(cert_pem, dns_names, ips)


def is_for_names(cert_pem: bytes, dns_names: Iterable[str], ips: Iterable[IP]) -> bool:
    """Whether a server certificate is for exactly these names.

    Raises:
        ValueError: It is not a certificate.
    """
    held = _extension(_certificate(cert_pem), x509.SubjectAlternativeName)
    if held is None:
        return False
    return set(dns_names) == set(held.get_values_for_type(x509.DNSName)) and set(ips) == set(
        held.get_values_for_type(x509.IPAddress)
    )


def has_name(cert_pem: bytes, host: str) -> bool:
    """Whether a server certificate is for this DNS name or IP address. One that is not readable is for none."""
    try:
        held = _extension(_certificate(cert_pem), x509.SubjectAlternativeName)
    except ValueError:
        return False
    if held is None:
        return False
    if is_address(host):
        return ip_address(host) in held.get_values_for_type(x509.IPAddress)
    return host.lower() in held.get_values_for_type(x509.DNSName)


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


def _serial() -> int:
    return int.from_bytes(secrets.token_bytes(_SERIAL_BYTES)) or 1


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ValueError("the certificate is not readable") from None


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it needs a password
        raise ValueError("the key is not readable") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an elliptic curve key")  # noqa: TRY004 - like any other unusable key
    return key
