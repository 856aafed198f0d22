"""`bkpool release`: ends a lease. The token of the lease is enough; so is having made the lease."""

from __future__ import annotations

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client


@click.command(short_help="End a lease and give its worker back.")
@options.token
@options.worker
@options.namespace
@options.as_json
@options.older_identity
def command(*, token: str | None, worker: str | None, namespace: str, as_json: bool) -> None:
    """End a lease and give its worker back.

    The gateway refuses new connections from now on. A running build may finish.
    """
    answer = Client(claims=options.claims()).release(options.lease(token, worker, namespace))
    console.answer(answer, as_json=as_json, show=lambda: str(answer.get("status", "released")))
