"""`bkpool release`: gives a worker back. The token itself is the right to ask."""

from __future__ import annotations

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client


@click.command(short_help="Give a leased worker back.")
@options.token
@options.as_json
def command(token: str | None, as_json: bool) -> None:
    """Give a leased worker back.

    New connections are refused from now on; a build that still runs may finish.
    """
    told = Client().release(options.lease_token(token))
    console.answer(told, as_json=as_json, show=lambda: str(told.get("status", "released")))
