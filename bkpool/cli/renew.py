"""`bkpool renew`: extends a lease. The token of the lease is enough; so is having made the lease."""

from __future__ import annotations

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client


@click.command(short_help="Extend a lease.")
@options.token
@options.worker
@options.namespace
@click.option(
    "--ttl",
    default="1h",
    show_default=True,
    callback=options.duration,
    help="New length of the lease, from now, such as 30m or 1h30m.",
)
@options.as_json
def command(*, token: str | None, worker: str | None, namespace: str, ttl: str, as_json: bool) -> None:
    """Set a new end of a lease, counted from now.

    The certificates stay valid. A lease cannot last longer than its pool allows (maxTokenTTL).
    """
    answer = Client().renew(options.lease(token, worker, namespace), ttl)
    console.answer(
        answer, as_json=as_json, show=lambda: f"{answer.get('workerName')} is yours until {answer.get('expiresAt')}"
    )
