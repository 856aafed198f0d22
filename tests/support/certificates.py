"""A CA that issues any certificate a test asks for, valid or not."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
"""The time at which the tests of the gateway start."""
HOUR = timedelta(hours=1)
YEAR = timedelta(days=365)
_PEM = serialization.Encoding.PEM
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h)


@dataclass(frozen=True)
class IssuedCertificate:
    """A certificate and its key, in PEM and in files."""

    cert: bytes
    key: bytes
    der: bytes
    directory: Path

    @property
    def files(self) -> tuple[str, str]:
        """Writes certificate and key to files, and returns their paths."""
        self.directory.mkdir(parents=True, exist_ok=True)
        cert, key = self.directory / "client.crt", self.directory / "client.key"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return str(cert), str(key)


_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
"""From Python 3.13 on, default contexts check as RFC 5280 says, and refuse a CA without it (VERIFY_X509_STRICT)."""


class CertificateFactory:
    """A CA for tests. Unlike bkpool.pki.authority, it also issues what bkpool never would.

    Args:
        directory: For the CA's certificate and for the files of what it issues.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA of the tests")])
        certificate = (
            x509.CertificateBuilder(self._name, self._name, self._key.public_key())
            .serial_number(1)
            .not_valid_before(NOW - 24 * HOUR)
            .not_valid_after(NOW + 10 * YEAR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(_PEM)
        self.file = directory / "ca.crt"
        self.file.write_bytes(self.pem)

    def issue(
        self,
        *names: str,
        usage: x509.ObjectIdentifier | None = Usage.CLIENT_AUTH,
        alternative: tuple[x509.GeneralName, ...] = (),
        begins: datetime = NOW - HOUR,
        ends: datetime = NOW + 10 * YEAR,
    ) -> IssuedCertificate:
        """Issues a certificate with these common names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        builder = (
            x509.CertificateBuilder(self._name, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if alternative:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return IssuedCertificate(
            certificate.public_bytes(_PEM),
            private,
            certificate.public_bytes(serialization.Encoding.DER),
            self._new_directory(),
        )

    def stored(self, cert: bytes, key: bytes) -> IssuedCertificate:
        """Wraps a certificate that another CA has issued."""
        return IssuedCertificate(cert, key, ssl.PEM_cert_to_DER_cert(cert.decode()), self._new_directory())

    def server(self) -> IssuedCertificate:
        """Issues a gateway's certificate for localhost."""
        return self.issue("gateway", usage=Usage.SERVER_AUTH, alternative=(x509.DNSName("localhost"),))

    def client(
        self,
        token: str,
        *,
        usage: x509.ObjectIdentifier | None = Usage.CLIENT_AUTH,
        alternative: tuple[x509.GeneralName, ...] = (),
        begins: datetime = NOW - HOUR,
        ends: datetime = NOW + 10 * YEAR,
    ) -> IssuedCertificate:
        """Issues the client certificate of the lease with this token."""
        return self.issue(f"alloc:{token}", usage=usage, alternative=alternative, begins=begins, ends=ends)

    def client_context(self, certificate: IssuedCertificate | None = None, *, alpn: bool = True) -> ssl.SSLContext:
        """Returns a client's TLS settings that trust this CA at any time."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.verify_flags |= _NO_CHECK_TIME  # the tests run at NOW
        if certificate is not None:
            context.load_cert_chain(*certificate.files)
        if alpn:
            context.set_alpn_protocols(["h2"])
        return context

    def _new_directory(self) -> Path:
        return self._directory / os.urandom(4).hex()
