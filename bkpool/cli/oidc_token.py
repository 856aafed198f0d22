"""`bkpool oidc-token`: gets a token from the development issuer, like the token that a CI platform gives a job."""

from __future__ import annotations

import json

import click

from bkpool.cli import console, credentials, home, options
from bkpool.cli.places import where
from bkpool.core.errors import InvalidInput, Unavailable
from bkpool.core.names import AUDIENCE, DEV_ISSUER_PORT


@click.command(short_help="Get a token from the development issuer.")
@click.option(
    "--issuer",
    metavar="URL",
    envvar=credentials.ISSUER_VARIABLE,
    help="The URL of the issuer.  [default: $BKCTL_OIDC_ISSUER, else the issuer that runs here]",
)
@click.option("--actor", "--oidc-actor", help="The user of the token.  [default: your user name]")
@click.option("--repository", "--oidc-repository", metavar="OWNER/NAME", help="The repository of the job.")
@click.option(
    "--subject",
    "--oidc-subject",
    help="The claim `sub`.  [default: with --repository that of a job on GitHub, else the actor]",
)
@click.option("--audience", help="The audience of the token.  [default: $BKCTL_AUDIENCE, else that of the appliance]")
@click.option(
    "--claim",
    "claims",
    metavar="NAME=VALUE",
    multiple=True,
    help="One more claim; the value is JSON or text. Repeatable.",
)
@click.option(
    "--duration",
    default="1h",
    show_default=True,
    callback=options.duration,
    help="How long the token is valid; at most 24h.",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON: token and expiresIn.")
def command(
    *,
    issuer: str | None,
    actor: str | None,
    repository: str | None,
    subject: str | None,
    audience: str | None,
    claims: tuple[str, ...],
    duration: str,
    as_json: bool,
) -> None:
    """Get a token from the development issuer of `bkpool up --dev-issuer`.

    Only the token is printed, also on a terminal.

    As in: export BKCTL_TOKEN=$(bkpool oidc-token --actor me --repository org/app)
    """
    from bkpool.cli import issuers  # noqa: PLC0415 - only here

    request = credentials.RequestedClaims(actor, repository, subject).request(
        audience or _own_audience(), duration=duration
    )
    request["claims"] |= dict(_claim(text) for text in claims)
    answer = issuers.mint(issuer or _default_issuer(), request, where("--issuer"))
    if as_json:
        console.answer(answer, as_json=True, show=str)
    else:
        click.echo(answer["token"])


def _own_audience() -> str:
    """The audience of the appliance to which calls go; the usual one where there is no answer."""
    from bkpool.cli.client import Client  # noqa: PLC0415 - only here

    try:
        return Client().audience()
    except Unavailable:
        return AUDIENCE


def _default_issuer() -> str:
    """The issuer, where the user names none."""
    running = home.running()
    here = running.dev_issuer if running else None
    return here or f"http://localhost:{DEV_ISSUER_PORT}"


def _claim(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(
            f"--claim: {text[:80]!r} is not of the form NAME=VALUE",
            hint="Write for example ref=refs/heads/main.",
            field="--claim",
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
