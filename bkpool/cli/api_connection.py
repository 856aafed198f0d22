"""Connections to an API: over TCP with or without TLS, or over the Unix socket of the appliance that runs here.

Before anything is sent over the Unix socket, the kernel is asked who listens there.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from bkpool.cli import console
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.home import local_socket

CONNECT_TIMEOUT = 10.0
"""Seconds."""


class ApiConnection(http.client.HTTPConnection):
    """A connection that is opened by a function, so that no name is looked up but where that function does it.

    Args:
        host: The host of the endpoint: for the header Host, and for the certificate.
        port: The port of the endpoint.
        dial: Opens the connection.
        tls: Encrypts it, if given.
    """

    def __init__(
        self, host: str, port: int, dial: Callable[[], socket.socket], tls: ssl.SSLContext | None = None
    ) -> None:
        self.default_port = http.client.HTTPS_PORT if tls else http.client.HTTP_PORT  # is not written into Host
        super().__init__(host, port)
        self._dial = dial
        self._tls = tls

    def connect(self) -> None:
        """Opens the connection. Raises OSError, and HostFault if a stranger listens on the Unix socket."""
        self.sock = self._dial()
        if self._tls is not None:
            try:
                self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)
            except BaseException:
                self.sock.close()
                raise


def dial_tcp(address: str, port: int) -> socket.socket:
    """A TCP connection. Raises OSError."""
    connected = socket.create_connection((address, port), CONNECT_TIMEOUT)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def dial_local(path: Path, home: Path) -> socket.socket:
    """A connection to the Unix socket of the appliance that runs from this home.

    The end of a user's session removes /run/user/UID with the socket. Then the appliance makes it elsewhere.

    Raises:
        OSError: Nobody listens there.
        HostFault: Another user listens there. Nothing was sent.
    """
    try:
        return _dial_local(path, home)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        spare = local_socket.spare(home)
        if not os.path.lexists(spare):
            raise
        return _dial_local(spare, home)


def _dial_local(path: Path, home: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(CONNECT_TIMEOUT)
        connected.connect(str(path))
        _check_server(connected, path, home)
    except BaseException:
        connected.close()
        raise
    return connected


def _check_server(connected: socket.socket, path: Path, home: Path) -> None:
    uid = local_socket.peer_uid(connected)
    if not local_socket.may_serve(uid, home):
        raise HostFault(
            f"{path}: user {uid} listens there, and this appliance is not theirs; nothing was sent",
            hint="Remove the socket, then restart the appliance: bkpool down, then bkpool up -d.",
            code="Permission",
        )


def tls_context(described: Mapping[str, str]) -> ssl.SSLContext:
    """The TLS settings of calls.

    Args:
        described: What the appliance of this home has recorded: which certificate or CA to trust. Empty for another
            appliance.

    Raises:
        InvalidInput: A file or a variable is not valid; the message names it.
    """
    given, pinned = os.environ.get("BKCTL_TLS_CA_CERT"), described.get("apiCert")
    ca = given or described.get("apiCa")
    try:
        context = _pinned(Path(pinned)) if pinned and not given else ssl.create_default_context(cafile=ca or None)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        source = "BKCTL_TLS_CA_CERT" if given or not described else "appliance.json"
        raise InvalidInput(
            f"{source}: {ca or pinned!r} is not a readable file of PEM certificates "
            f"({getattr(error, 'strerror', None) or error})",
            hint="Name the file with the CA's certificate in BKCTL_TLS_CA_CERT.",
            field=source,
        ) from None
    if _flag("BKCTL_TLS_SKIP_VERIFY"):
        console.note("note: BKCTL_TLS_SKIP_VERIFY is set: any server that answers is taken for the appliance.")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _pinned(file: Path) -> ssl.SSLContext:
    """Trusts only the certificate that the appliance here was given, under any name."""
    first, end, _ = file.read_text("ascii", "replace").partition("-----END CERTIFICATE-----")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=first + end)
    return context


def _flag(variable: str) -> bool:
    value = os.environ.get(variable, "").lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"", "0", "false", "no", "off"}:
        return False
    raise InvalidInput(
        f"{variable}: {value[:40]!r} is neither true nor false", hint="Set it to 1 or 0.", field=variable
    )
