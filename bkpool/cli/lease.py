"""A lease in the hands of its holder: its certificates on disk, and the buildx command that uses them.

Keys are made here, written 0600, and never leave the directory that they were asked into.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from bkpool.cli import keys
from bkpool.cli.client import Client
from bkpool.cli.options import LEASE_FILE
from bkpool.core import durations
from bkpool.core.errors import HostFault, Unavailable

FILES = {"ca.crt": "caCert", "client.crt": "clientCert", "client.key": "clientKey"}
"""File name to field of the allocation's answer, each base64 of PEM."""
_WITHOUT_KEY = ("workerName", "token", "endpoint", "gatewayEndpoint", "expiresAt")


def allocated(client: Client, request: dict[str, Any]) -> dict[str, Any]:
    """Leases a worker with a key of our own; the answer has it as `clientKey`, as the contract has one.

    Args:
        client: Who asks.
        request: The body of the call, without `csr`.
    """
    key, csr = keys.make()
    lease = client.allocate({**request, "csr": csr}, wait=durations.parse(request["wait"]).total_seconds())
    return lease | {"clientKey": base64.b64encode(key).decode()}


def prepared(directory: Path) -> Path:
    """The directory, made 0700 if it was missing, and known to be writable; absolute.

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
            hint="Give a directory that you may write.",
            code="Permission",
        ) from None


def save(lease: dict[str, Any], directory: Path, *, token: bool) -> None:
    """Writes ca.crt, client.crt and client.key, and with `token` lease.json, which `release --token` reads.

    Raises:
        HostFault: A file cannot be written.
        Unavailable: The answer holds no certificates.
    """
    try:
        contents = {name: base64.b64decode(lease[field], validate=True) for name, field in FILES.items()}
        if token:
            contents[LEASE_FILE] = json.dumps({field: lease[field] for field in _WITHOUT_KEY}, indent=2).encode()
    except (KeyError, ValueError, TypeError):
        raise Unavailable(
            "the appliance's answer holds no certificates", hint="Compare `bkpool version` there."
        ) from None
    try:
        for name, content in contents.items():
            _write(directory / name, content)
    except OSError as error:
        raise HostFault(
            f"the certificates cannot be written to {directory}: {error.strerror}", hint="Make room there."
        ) from None


def create_arguments(lease: dict[str, Any], directory: Path, builder: str) -> list[str]:
    """The arguments of buildx that make a builder of this lease. Paths are absolute: buildx wants them so."""
    gateway = str(lease["gatewayEndpoint"])
    url = gateway if "://" in gateway else f"tcp://{gateway}"
    options = ",".join(
        _csv(f"{key}={directory / name}")
        for key, name in (("cacert", "ca.crt"), ("cert", "client.crt"), ("key", "client.key"))
    )
    return ["create", "--name", builder, "--driver", "remote", "--driver-opt", options, url]


def create_line(lease: dict[str, Any], directory: Path) -> str:
    """The command for a person to copy."""
    return shlex.join(["docker", "buildx", *create_arguments(lease, directory, lease["workerName"])])


def _csv(field: str) -> str:
    """A field as buildx reads the options: one line of CSV (RFC 4180)."""
    return '"' + field.replace('"', '""') + '"' if {",", '"'} & set(field) else field


def _write(path: Path, content: bytes) -> None:
    """Replaces the file at once, so that it is whole and 0600 from its first moment."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
