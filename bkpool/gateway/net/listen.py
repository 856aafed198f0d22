"""Opens the gateway's ports, and says what is wrong with an address that cannot be used.

It accepts nothing: `bkpool.ports.acceptor` does.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

from bkpool.core.errors import HostFault

Address = tuple[str, int]

_BACKLOG = 1024


def listen(addresses: Sequence[Address]) -> list[socket.socket]:
    """Returns sockets that listen on these addresses.

    Raises:
        HostFault: An address is in use (code PortTaken), forbidden (code Permission) or not of this machine (code
            HostFault). No socket stays open then.
    """
    listeners: list[socket.socket] = []
    try:
        for host, port in addresses:
            listeners.append(_listen(host, port))
    except HostFault:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> HostFault:
    if error.errno == errno.EADDRINUSE:
        return HostFault(
            f"port {port} on {host} is in use by another program, and the gateway needs it",
            hint=f"Stop what `ss -ltnp 'sport = :{port}'` shows, or choose another port.",
            code="PortTaken",
        )
    if error.errno == errno.EACCES:
        return HostFault(
            f"the gateway is not allowed to listen on port {port} of {host}",
            hint="Choose a port above 1023.",
            code="Permission",
        )
    reason = str(error.strerror or error)
    if error.errno is not None and not isinstance(error, socket.gaierror):
        reason = os.strerror(error.errno)  # socket.create_server adds a clause about bind, with the address again
    return HostFault(
        f"the gateway cannot listen on {host}:{port}: {reason}",
        hint="Choose an address of this machine.",
    )
