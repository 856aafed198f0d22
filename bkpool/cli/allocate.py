"""`bkpool allocate`: leases one worker for one job and gets the certificates to connect to it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from bkpool.cli import console, home, options
from bkpool.cli import lease as leases
from bkpool.cli.client import Client
from bkpool.cli.signals import Signals
from bkpool.core.errors import BkpoolError
from bkpool.core.names import DEFAULT_POOL


@click.command(short_help="Lease a worker and get the certificates for it.")
@click.option("-p", "--pool", default=DEFAULT_POOL, show_default=True, help="The pool of the worker.")
@options.namespace
@click.option(
    "--ttl",
    default="1h",
    show_default=True,
    callback=options.duration,
    help="How long the lease lasts, such as 30m or 1h30m.",
)
@click.option(
    "--job-id", default="", help="The name of your job. A second allocate with the same name returns the same lease."
)
@options.wait
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write ca.crt, client.crt, client.key and lease.json into this directory (mode 0600) and print the `buildx "
    "create` command.",
)
@options.as_json
@options.older_identity
def command(
    *, pool: str, namespace: str, ttl: str, job_id: str, wait: str | None, out: Path | None, as_json: bool
) -> int:
    """Lease a worker and get the certificates for it.

    If stdout is not a terminal, the answer is JSON: workerName, token, endpoint, gatewayEndpoint, expiresAt, and
    caCert, clientCert, clientKey in base64. On a terminal, the certificates are written to a private directory, and
    the command that makes a builder is shown. The key is made on this machine and is never sent.
    """
    directory = leases.prepare_directory(out) if out else None
    client = Client(claims=options.claims())
    request = {"poolName": pool, "namespace": namespace, "jobId": job_id, "ttl": ttl, "wait": wait}
    for_person = sys.stdout.isatty() and not as_json
    with Signals() as signals:
        lease = leases.allocate(client, request, signals)
        if lease is not None:
            try:
                directory = _save(lease, directory, namespace, for_person=for_person)
            except BkpoolError:
                leases.release(client, lease["token"])
                raise
    if lease is not None and signals.received is not None:
        leases.release(client, lease["token"])
        lease = None
    if lease is None:
        return 128 + (signals.received or 0)
    create = leases.create_line(lease, directory) if directory else ""
    if create and not for_person:
        console.note(create)
    console.answer(lease, as_json=as_json, show=lambda: _shown(lease, directory, create))
    return 0


def _save(lease: dict[str, Any], directory: Path | None, namespace: str, *, for_person: bool) -> Path | None:
    """Writes the files of a lease: into the directory that the user named, else for a person into one of the home."""
    if for_person and directory is None:
        directory = leases.prepare_directory(home.home() / "leases" / namespace / lease["workerName"])
    if directory is not None:
        note = leases.note_on_earlier(directory, lease)
        leases.save(lease, directory, token=True)
        if note:
            console.note(note)
    return directory


def _shown(lease: dict[str, Any], directory: Path | None, create: str) -> str:
    """Plain lines, which a narrow terminal does not break: users copy the commands."""
    return (
        f"worker        {lease['workerName']}\n"
        f"gateway       {lease['gatewayEndpoint']}\n"
        f"expires       {lease['expiresAt']}\n"
        f"certificates  {directory}\n"
        f"\n{create}\n"
        f"bkpool release --token {shlex.quote(str(directory))}"
    )
