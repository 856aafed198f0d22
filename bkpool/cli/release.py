"""`bkpool release`: ends a lease. The token of the lease is enough; so is having made the lease."""

from __future__ import annotations

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client


@click.command(short_help="End a lease and give its worker back.")
@options.token
@options.worker
@options.namespace
@click.option("--now", is_flag=True, help="Cut open connections and the builds that use them.")
@options.as_json
@options.older_identity
def command(*, token: str | None, worker: str | None, namespace: str, now: bool, as_json: bool) -> None:
    """End a lease and give its worker back.

    The gateway refuses new connections from now on. A running build may finish, unless --now is given.
    """
    answer = Client(claims=options.claims()).release(options.lease(token, worker, namespace), now=now)
    console.answer(answer, as_json=as_json, show=lambda: str(answer.get("status", "released")))
