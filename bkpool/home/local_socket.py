"""The Unix socket on which an appliance serves its API to the commands of its own machine.

Each side asks the kernel who the other one is, so a socket that another user put there gets nothing, and a connection
of another user is not served. Nothing here knows HTTP or a token.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bkpool.home import runtime_directory

_NAME = "api.sock"
_PEER = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_ROOT = 0


class SocketPlaces(NamedTuple):
    """Where the socket of a home is."""

    path: Path
    spare: Path
    """Where it is while the directory of `path` cannot be made, as after the end of a session (/run/user)."""


def spare(home: Path) -> Path:
    """Where a command looks for the socket of this home, if it is not where the appliance made it at its start."""
    return runtime_directory.last_resort(home) / _NAME


def prepare(home: Path, environ: Mapping[str, str]) -> SocketPlaces:
    """The places for the socket of this home, in directories that only this user may enter.

    What a killed appliance of this home has left is removed. The caller holds the lock of the home.

    Raises:
        HostFault: The directory is not safe, cannot be made, or is too deep for a socket.
    """
    remove(home, environ)
    directory = runtime_directory.default_directory(home, environ)
    path = directory / _NAME
    runtime_directory.check_length(path, directory)
    runtime_directory.claim(directory)
    return SocketPlaces(path, spare(home))


def remove(home: Path, environ: Mapping[str, str]) -> None:
    """Removes the socket of this home, and its directory if nothing else is in there."""
    places = (
        runtime_directory.default_directory(home, environ),
        *runtime_directory.former_directories(home, environ),
    )
    for directory in filter(runtime_directory.is_private, places):
        with suppress(OSError):
            (directory / _NAME).unlink(missing_ok=True)
            directory.rmdir()


def peer_uid(connected: socket.socket) -> int:
    """The user id of the other side, as the kernel noted it when that side listened or connected (SO_PEERCRED)."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(credentials)
    return int(uid)


def may_connect(uid: int) -> bool:
    """Whether the appliance serves this user: its own one, and root."""
    return uid in {_ROOT, os.geteuid()}


def may_serve(uid: int, home: Path) -> bool:
    """Whether a command may send a token to a server of this user.

    Args:
        uid: The user who listens.
        home: The home that names the socket. Root may use the home of another user, who can read its tokens anyway.
    """
    trusted = {_ROOT, os.geteuid()}
    if os.geteuid() == _ROOT:
        with suppress(OSError):
            trusted.add(home.stat().st_uid)
    return uid in trusted
