"""The API's certificate: issued by a CA of the appliance, or read from files that another program renews.

A new certificate is used from the next handshake on, without a restart, and open connections are not touched. A file
that cannot be used is logged, and the former certificate stays in use; at the start it is an error.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from bkpool.appliance.run_options import RunOptions
from bkpool.core.errors import HostFault
from bkpool.core.names import Key
from bkpool.core.wall_clock import pause_until
from bkpool.home.files import write_private
from bkpool.install.manifests import CONTROLLER
from bkpool.pki.authority import Authority, renew_at
from bkpool.pki.bundle import CA_CERT
from bkpool.pki.chain import load_chain
from bkpool.pki.names import CertificateNames, gateway_names, parse_host
from bkpool.ports.server_tls import new_server_context

log = structlog.get_logger(__name__)

FILE_CHECK_SECONDS = 10.0
"""Time between two checks of the files. Certificates are renewed days before they expire, so this is not critical."""
_ALWAYS_DUE_SECONDS = 3600.0
_ALL_INTERFACES = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - addresses that are not a name
_MISMATCH = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})  # the last: RSA and EC
_HINT = "Give a PEM certificate (with its chain) and its key, without a passphrase."


def make_api_tls(options: RunOptions, authority: Authority, now: Callable[[], datetime]) -> ApiTls | None:
    """The API's TLS according to the settings; None if the API is served in clear.

    The caller runs the returned object's `run` beside the server.

    Args:
        options: `api.cert` and `api.key`, or else `api.tls`; and what gives the names of the API.
        authority: Signs the certificate if no files are given.
        now: The clock.

    Raises:
        HostFault: `Unreadable`: the files cannot be used. `AuthorityExpired`: the CA has expired.
    """
    api = options.settings.api
    if api.cert is not None and api.key is not None:
        return FileTls(GivenFile(api.cert, options.where("api.cert")), GivenFile(api.key, options.where("api.key")))
    life = options.settings.certificates.server_life
    return IssuedTls(authority, api_names(options), options.home, now, life) if api.tls else None


def api_names(options: RunOptions) -> CertificateNames:
    """The names of the API: this machine's, those that the user gave, and that of its Service in a cluster.

    Raises:
        InvalidInput: A name that the user gave is neither a DNS name nor an IP address.
    """
    settings = options.settings
    host, _ = settings.api.address
    extra = settings.gateway.hosts
    if host not in _ALL_INTERFACES:
        parse_host(host, options.where("api.address"))  # checked here, so that the message names its setting
        extra = (*extra, host)
    pools = [Key(settings.kubernetes.namespace, CONTROLLER)]
    return gateway_names(socket.gethostname(), pools, extra, options.where("gateway.hosts"))


class ApiTls(ABC):
    """A server context whose certificate can be replaced. `run`, beside the server, replaces it when it is due.

    It accepts TLS 1.2 and newer, because some HTTP clients and proxies know nothing newer. The gateway requires 1.3,
    because there a client certificate that contains a token is sent in the handshake; here no client sends one.
    """

    def __init__(self) -> None:
        self.context = _server_context()
        # The context is replaced as a whole: an SSLContext keeps its old certificate if one with another kind of key
        # is loaded into it. OpenSSL calls this in every handshake, also if the client names no server.
        self._current = self.context
        self.context.sni_callback = self._use_current
        self.refresh()

    @abstractmethod
    def refresh(self) -> bool:
        """Replaces the certificate if it is due; returns whether it did."""

    @abstractmethod
    def pause(self) -> float:
        """Seconds until `refresh` should be called again."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `appliance.json` says about it: what callers on this machine should trust."""

    async def run(self) -> None:
        """Replaces the certificate whenever it is due, until cancelled."""
        while True:
            await asyncio.sleep(self.pause())
            self.refresh()

    def _take(self, cert_pem: bytes, key_pem: bytes) -> None:
        context = _server_context()
        load_chain(context, cert_pem, key_pem)
        self._current = context

    def _use_current(self, connection: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        connection.context = self._current


class IssuedTls(ApiTls):
    """A certificate of a CA of the appliance, only in memory. Callers trust the CA.

    Args:
        authority: Signs it.
        names: The names of the API.
        home: Where the CA's certificate is written for callers on this machine.
        now: The clock.
        life: How long a certificate is valid.
    """

    def __init__(
        self,
        authority: Authority,
        names: CertificateNames,
        home: Path,
        now: Callable[[], datetime],
        life: timedelta,
    ) -> None:
        self._authority = authority
        self._names = names
        self._ca = home / "pki" / CA_CERT
        self._now = now
        self._life = life
        self._due = now()
        super().__init__()

    def refresh(self) -> bool:
        """See ApiTls. Raises HostFault `AuthorityExpired`."""
        now = self._now()
        if now < self._due:
            return False
        leaf = self._authority.issue_server(self._names.dns, self._names.ips, now, now + self._life)
        self._take(leaf.cert_pem, leaf.key_pem or b"")
        self._due = renew_at(leaf.cert_pem)
        log.info("api.certificate_issued", renew_at=self._due.isoformat(), names=list(self._names.dns))
        return True

    def pause(self) -> float:
        """Seconds until the next look: an hour if it is always due, because its CA ends soon."""
        now = self._now()
        return _ALWAYS_DUE_SECONDS if now >= self._due else pause_until(self._due, now)

    @property
    def description(self) -> dict[str, Any]:
        """The path of the CA's certificate, which is written here if the backend has not done so."""
        if not self._ca.exists() or self._ca.read_bytes() != self._authority.cert_pem:
            write_private(self._ca, self._authority.cert_pem)
        return {"apiCa": str(self._ca)}


class GivenFile(NamedTuple):
    """A file, and what gave it, for error messages."""

    path: Path
    where: str

    def read(self) -> bytes:
        """The content. Raises HostFault `Unreadable`."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise self.fault(error.strerror or type(error).__name__) from None

    def fault(self, reason: str) -> HostFault:
        """The error for a file that cannot be used."""
        return _unusable(f"{self.where}: {self.path} cannot be used: {reason}")


class FileTls(ApiTls):
    """A certificate from files.

    Args:
        cert: The certificate with its chain, PEM.
        key: Its key, PEM, without a passphrase.
    """

    def __init__(self, cert: GivenFile, key: GivenFile) -> None:
        self._cert = cert
        self._key = key
        self._read: tuple[bytes, bytes] | None = None
        super().__init__()

    def refresh(self) -> bool:
        """See ApiTls. Raises HostFault `Unreadable` at the first call only."""
        first = self._read is None
        try:
            read = (self._cert.read(), self._key.read())
            if read == self._read:
                return False
            self._read = read
            self._use(*read)
        except HostFault as fault:
            if first:
                raise
            log.error("api.certificate_refused", reason=fault.message)  # noqa: TRY400 - the reason is complete
            return False
        log.info("api.certificate_read", file=str(self._cert.path))
        return True

    def _use(self, cert_pem: bytes, key_pem: bytes) -> None:
        """Takes the certificate. Raises HostFault, which names the file that is at fault and no part of a key."""
        try:
            load_pem_private_key(key_pem, password=None)  # OpenSSL would ask on the terminal for a passphrase
        except TypeError:
            raise self._key.fault("the key has a passphrase") from None
        except (ValueError, UnsupportedAlgorithm):
            raise self._key.fault("it is not a PEM private key") from None
        try:
            self._take(cert_pem, key_pem)
        except ssl.SSLError as error:
            if error.reason in _MISMATCH:
                raise _unusable(
                    f"{self._cert.where} and {self._key.where}: the key {self._key.path} does not belong to the "
                    f"certificate {self._cert.path}"
                ) from None
            raise self._cert.fault(_why_not(cert_pem, error)) from None

    def pause(self) -> float:
        """Seconds until the files are checked again."""
        return FILE_CHECK_SECONDS

    @property
    def description(self) -> dict[str, Any]:
        """The path of the certificate: a caller on this machine trusts exactly this one, whatever name they use."""
        return {"apiCert": str(self._cert.path)}


def _server_context() -> ssl.SSLContext:
    return new_server_context(ssl.TLSVersion.TLSv1_2)


def _unusable(message: str) -> HostFault:
    return HostFault(message, hint=_HINT, code="Unreadable")


def _why_not(cert_pem: bytes, error: ssl.SSLError) -> str:
    try:
        load_pem_x509_certificates(cert_pem)
    except ValueError:
        return "it is not a PEM certificate"
    return f"OpenSSL refuses it ({error.reason})"
