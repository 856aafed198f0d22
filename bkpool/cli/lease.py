"""A lease for its caller: its certificates on disk, and the buildx command that uses them.

Keys are made here and written with mode 0600. They never leave the directory that the caller named.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bkpool.cli import console, keys
from bkpool.cli.client import Client
from bkpool.cli.options import LEASE_FILE
from bkpool.cli.signals import Signals
from bkpool.core import durations
from bkpool.core.errors import BkpoolError, Gone, HostFault, NotFound, Unavailable
from bkpool.core.names import DEFAULT_WAIT

CERTIFICATE_FILES = {"ca.crt": "caCert", "client.crt": "clientCert", "client.key": "clientKey"}
"""File name to field of the answer of allocate; each field is PEM in base64."""
_LEASE_FIELDS = ("workerName", "token", "endpoint", "gatewayEndpoint", "expiresAt")


def allocate(client: Client, request: dict[str, Any], signals: Signals) -> dict[str, Any] | None:
    """Leases a worker with a key that is made here. The answer has it as `clientKey`, as if the API had made it.

    Args:
        client: Makes the call.
        request: The body of the call, without `csr`. A field that is None is left out.
        signals: Catches the signals.

    Returns:
        The lease. None if a signal arrived first; a lease that arrives after it is released here.

    Raises:
        BkpoolError: There is no lease; the message has the reason.
        SystemExit: A signal arrived before a request was sent.
    """

    def stop(number: int) -> None:
        if not client.hang_up():
            raise SystemExit(128 + number)

    given = {field: value for field, value in request.items() if value is not None}
    wait = (durations.parse(given["wait"]) if "wait" in given else DEFAULT_WAIT).total_seconds()
    signals.act(stop)
    try:
        with console.Progress(f"waiting for a worker of pool {request['poolName']}"):
            key, csr = keys.make()
            lease = client.allocate({**given, "csr": csr}, wait=wait)
    except BkpoolError:
        if signals.received is None:
            raise
        return None
    finally:
        signals.act(None)
    if signals.received is not None:
        release(client, lease["token"])
        return None
    return lease | {"clientKey": base64.b64encode(key).decode()}


def release(client: Client, token: str) -> None:
    """Ends a lease at the end of a command. If that fails, a note says so.

    A signal shortens the wait for the answer (`Client.give_up`), because the lease expires by itself.
    """
    arrived: list[int] = []

    def stop(number: int) -> None:
        arrived.append(number)
        if not client.give_up() and len(arrived) > 1:
            raise Unavailable("interrupted")

    with Signals() as signals:
        try:
            signals.act(stop)
            client.release(token)
        except (Gone, NotFound):
            return
        except BkpoolError as error:
            console.note(
                f"warning: the worker was not released, and its lease will expire by itself: {error.message}"
            )
        finally:
            signals.act(None)


def prepare_directory(directory: Path) -> Path:
    """The directory as an absolute path; made with mode 0700 if it is missing, and checked to be writable.

    Raises:
        HostFault: It cannot be made or written.
    """
    directory = directory.absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        raise HostFault(
            f"the certificates cannot be written to {directory}: {error.strerror}",
            hint="Give a directory that you may write to.",
            code="Permission",
        ) from None


def save(lease: dict[str, Any], directory: Path, *, token: bool) -> None:
    """Writes ca.crt, client.crt and client.key; with `token` also lease.json, which `release --token` reads.

    Raises:
        HostFault: A file cannot be written.
        Unavailable: The answer has no certificates.
    """
    try:
        contents = {name: base64.b64decode(lease[field], validate=True) for name, field in CERTIFICATE_FILES.items()}
        if token:
            contents[LEASE_FILE] = json.dumps({field: lease[field] for field in _LEASE_FIELDS}, indent=2).encode()
    except (KeyError, ValueError, TypeError):
        raise Unavailable(
            "the answer of the appliance has no certificates",
            hint="Check with `bkpool version` that both have the same version.",
        ) from None
    try:
        for name, content in contents.items():
            _write(directory / name, content)
    except OSError as error:
        raise HostFault(
            f"the certificates cannot be written to {directory}: {error.strerror}",
            hint="Free some space in that directory.",
        ) from None


def note_on_earlier(directory: Path, lease: dict[str, Any]) -> str:
    """What the user must know about the lease whose files are in a directory, before a new one replaces them.

    Args:
        directory: Where the files of the new lease go.
        lease: The new lease.

    Returns:
        A note; empty if there is no other lease, or it has ended.
    """
    try:
        earlier = json.loads((directory / LEASE_FILE).read_bytes())
        worker, expires = str(earlier["workerName"]), str(earlier["expiresAt"])
        ended = datetime.fromisoformat(expires) <= datetime.now(UTC)
        same = earlier["token"] == lease.get("token")
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if ended or same:
        return ""
    return (
        f"note: {directory} had the files of an earlier lease, of worker {worker}. That lease goes on until it "
        f"expires at {expires}. End it with `bkpool release --worker {shlex.quote(worker)}`. Next time, run "
        f"`bkpool release --token {shlex.quote(str(directory))}` before you allocate into this directory."
    )


def create_arguments(lease: dict[str, Any], directory: Path, builder: str) -> list[str]:
    """The arguments with which buildx makes a builder for this lease. buildx needs absolute paths."""
    gateway = str(lease["gatewayEndpoint"])
    url = gateway if "://" in gateway else f"tcp://{gateway}"
    options = ",".join(
        _csv(f"{key}={directory / name}")
        for key, name in (("cacert", "ca.crt"), ("cert", "client.crt"), ("key", "client.key"))
    )
    return ["create", "--name", builder, "--driver", "remote", "--driver-opt", options, url]


def create_line(lease: dict[str, Any], directory: Path) -> str:
    """The command `buildx create`, for the user to copy."""
    return shlex.join(["docker", "buildx", *create_arguments(lease, directory, lease["workerName"])])


def _csv(field: str) -> str:
    """One field of the options, which buildx reads as a line of CSV (RFC 4180)."""
    return '"' + field.replace('"', '""') + '"' if {",", '"'} & set(field) else field


def _write(path: Path, content: bytes) -> None:
    """Replaces the file in one step, so that it is always complete and has mode 0600."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
