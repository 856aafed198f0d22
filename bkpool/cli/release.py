"""`bkpool release`: gives a worker back. The lease's token is itself the right to ask, and so is having made it."""

from __future__ import annotations

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client


@click.command(short_help="Give a leased worker back.")
@options.token
@options.worker
@options.namespace
@options.as_json
@options.older_identity
def command(*, token: str | None, worker: str | None, namespace: str, as_json: bool) -> None:
    """Give a leased worker back.

    New connections are refused from now on; a build that still runs may finish.
    """
    told = Client(asked=options.asked()).release(options.lease(token, worker, namespace))
    console.answer(told, as_json=as_json, show=lambda: str(told.get("status", "released")))
