"""`bkpool oidc-token`: its name is kept for the development issuer, which is not here yet."""

from __future__ import annotations

from typing import NoReturn

import click

from bkpool.cli import options
from bkpool.core.errors import Unavailable


@click.command(
    short_help="Get a token from the development issuer (a later release).",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@options.older_identity
def command() -> NoReturn:
    """Get a token from the development issuer, which comes in a later release."""
    raise Unavailable(
        "oidc-token comes with the development issuer in a later release",
        hint="Here the local admin token is found by itself; elsewhere set BKCTL_TOKEN.",
    )
