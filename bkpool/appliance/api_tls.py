"""The API's certificate: from our own authority, or from files that somebody else keeps up to date.

A new one serves the next handshake, without a restart and without touching open connections. A file that cannot be
used is logged and the certificate of before stays; only at the start it is an error.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bkpool.appliance.parts import running
from bkpool.appliance.settings import Settings
from bkpool.core.errors import HostFault
from bkpool.core.names import Key
from bkpool.home.files import write_private
from bkpool.install.manifests import CONTROLLER
from bkpool.pki.authority import SERVER_LIFE, Authority, renew_at
from bkpool.pki.bundle import CA_CERT
from bkpool.pki.chain import load_chain
from bkpool.pki.names import CertificateNames, gateway_names

log = structlog.get_logger(__name__)

LOOK_AGAIN = 10.0
"""Seconds between two looks at the files: a certificate is renewed days before its end, so any of them would do."""
_ANYWHERE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - addresses that are no name
_HINT = "Give a PEM certificate (with its chain) and its key, without a passphrase."


def open_api_tls(settings: Settings, authority: Authority, now: Callable[[], datetime]) -> ApiTls | None:
    """The API's TLS as the settings want it; None where it is served in clear.

    Args:
        settings: `api_tls`, or `api_cert` and `api_key`, which come first; and by which names the API is called.
        authority: Signs the certificate where no files are given.
        now: The clock.

    Raises:
        HostFault: `Unreadable`: the files cannot be used. `AuthorityExpired`.
    """
    if settings.api_cert is not None and settings.api_key is not None:
        return FileTls(settings.api_cert, settings.api_key)
    return OwnTls(authority, api_names(settings), settings.home, now) if settings.api_tls else None


async def enter_api_tls(
    stack: AsyncExitStack,
    settings: Settings,
    authority: Authority,
    now: Callable[[], datetime],
    died: Callable[[BaseException], None],
) -> ApiTls | None:
    """The same, kept right until the stack is closed; see `parts.running` for `died`."""
    tls = open_api_tls(settings, authority, now)
    if tls is not None:
        await stack.enter_async_context(running(tls.run(), died))
    return tls


def api_names(settings: Settings) -> CertificateNames:
    """By which names the API is called: this machine's, the user's own for it, and its Service's in a cluster."""
    host, _ = settings.api_address
    extra = (*settings.gateway_hosts, *(() if host in _ANYWHERE else (host,)))
    return gateway_names(socket.gethostname(), [Key(settings.namespace, CONTROLLER)], extra)


class ApiTls(ABC):
    """A server's context whose certificate changes under it. `run` keeps it right; it is to run beside the server.

    From TLS 1.2 on: unlike at the gateway no certificate of a client's, with a token in it, crosses the wire in the
    handshake, and some HTTP clients and proxies know nothing newer.
    """

    def __init__(self) -> None:
        self.context = _server_context()
        # One that is swapped as a whole: an SSLContext into which another is loaded keeps the old one, too, where
        # their keys are of different kinds. Called for every handshake, also for one that names no server.
        self._current = self.context
        self.context.sni_callback = self._swap
        self.refresh()

    @abstractmethod
    def refresh(self) -> bool:
        """Takes a new certificate if it is time for one; whether it did."""

    @abstractmethod
    def pause(self) -> float:
        """Seconds until `refresh` should be called again."""

    @property
    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What `appliance.json` says of it, so that callers on this machine know whom to trust."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.pause())
            self.refresh()

    def _take(self, cert_pem: bytes, key_pem: bytes) -> None:
        context = _server_context()
        load_chain(context, cert_pem, key_pem)
        self._current = context

    def _swap(self, connection: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        connection.context = self._current


class OwnTls(ApiTls):
    """A certificate of our own authority, in memory only: what callers trust is the authority.

    Args:
        authority: Signs it.
        names: By which the API is called.
        home: Where the authority's certificate is put for callers on this machine.
        now: The clock.
    """

    def __init__(
        self, authority: Authority, names: CertificateNames, home: Path, now: Callable[[], datetime]
    ) -> None:
        self._authority = authority
        self._names = names
        self._ca = home / "pki" / CA_CERT
        self._now = now
        self._due = now()
        super().__init__()

    def refresh(self) -> bool:
        """See ApiTls. Raises HostFault `AuthorityExpired`."""
        now = self._now()
        if now < self._due:
            return False
        leaf = self._authority.issue_server(self._names.dns, self._names.ips, now, now + SERVER_LIFE)
        self._take(leaf.cert_pem, leaf.key_pem or b"")
        self._due = renew_at(leaf.cert_pem)
        log.info("api.certificate_issued", renew_at=self._due.isoformat(), names=list(self._names.dns))
        return True

    def pause(self) -> float:
        """A day at the most: a machine may have slept meanwhile, and what ends with the authority is due at once."""
        return min(86_400.0, max(3600.0, (self._due - self._now()).total_seconds()))

    @property
    def described(self) -> dict[str, Any]:
        """The authority's certificate. On the process backend it is there; elsewhere it is put there."""
        if not self._ca.exists() or self._ca.read_bytes() != self._authority.cert_pem:
            write_private(self._ca, self._authority.cert_pem)
        return {"apiCa": str(self._ca)}


class FileTls(ApiTls):
    """A certificate from files.

    Args:
        cert: PEM, with its chain.
        key: PEM, without a passphrase.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._files = (cert, key)
        self._read: tuple[bytes, bytes] | None = None
        super().__init__()

    def refresh(self) -> bool:
        """See ApiTls. At the start only it raises HostFault `Unreadable`."""
        first = self._read is None
        try:
            read = (self._files[0].read_bytes(), self._files[1].read_bytes())
            if read == self._read:
                return False
            self._read = read
            load_pem_private_key(read[1], password=None)  # OpenSSL itself would ask a terminal for the passphrase
            self._take(*read)
        except (OSError, ValueError, TypeError) as error:  # ssl.SSLError is an OSError
            fault = HostFault(
                f"--api-cert {self._files[0]} and --api-key {self._files[1]} cannot be used: {_why(error)}",
                hint=_HINT,
                code="Unreadable",
            )
            if first:
                raise fault from None
            log.error("api.certificate_refused", reason=fault.message)  # noqa: TRY400 - the reason says it all
            return False
        log.info("api.certificate_read", file=str(self._files[0]))
        return True

    def pause(self) -> float:
        """Time to look at the files again."""
        return LOOK_AGAIN

    @property
    def described(self) -> dict[str, Any]:
        """The certificate itself: a caller on this machine expects just this one, by whatever name it is called."""
        return {"apiCert": str(self._files[0])}


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _why(error: Exception) -> str:
    """What is wrong, without anything of a key."""
    if isinstance(error, ssl.SSLError):
        return "the key is not the certificate's" if error.reason == "KEY_VALUES_MISMATCH" else "no PEM certificate"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return "the key has a passphrase" if isinstance(error, TypeError) else "the key is no PEM private key"
