"""`bkpool renew`: lets a lease run longer. The lease's token is itself the right to ask, and so is having made it."""

from __future__ import annotations

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client


@click.command(short_help="Let a lease run longer.")
@options.token
@options.worker
@options.namespace
@click.option("--ttl", default="1h", show_default=True, callback=options.duration, help="From now, as 30m or 1h30m.")
@options.as_json
def command(*, token: str | None, worker: str | None, namespace: str, ttl: str, as_json: bool) -> None:
    """Let a lease run for another while, counted from now.

    The certificates stay the same; beyond the pool's longest life of a lease nothing is renewed.
    """
    told = Client().renew(options.lease(token, worker, namespace), ttl)
    console.answer(
        told, as_json=as_json, show=lambda: f"{told.get('workerName')} is yours until {told.get('expiresAt')}"
    )
