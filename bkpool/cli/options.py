"""The options that several commands share, and how a token is given without standing in argv."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from bkpool.cli.client import Lease, NamedLease
from bkpool.cli.credentials import Asked
from bkpool.core import durations, tokens
from bkpool.core.errors import InvalidInput, NotFound
from bkpool.core.names import DEFAULT_NAMESPACE

F = TypeVar("F", bound=Callable[..., Any])

LEASE_TOKEN = "BKPOOL_LEASE_TOKEN"  # noqa: S105 - the name of a variable
LEASE_FILE = "lease.json"
"""In the directory of `allocate --out`: the lease without its key."""
_LONGEST_FILE = 1 << 20
_ASKED = "bkpool.asked"

namespace = click.option(
    "-n",
    "--namespace",
    default=DEFAULT_NAMESPACE,
    envvar="BKCTL_NAMESPACE",
    show_default=True,
    show_envvar=True,
    help="The pool's namespace.",
)
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Answer in JSON, as always when stdout is no terminal."
)
token = click.option(
    "-t",
    "--token",
    metavar="FROM",
    envvar=LEASE_TOKEN,
    help=f"Where the lease's token is: `-` (stdin), a file with the token or with the JSON of `allocate`, the "
    f"directory of `allocate --out`, or the token itself, which others on this machine can then see. Without it: "
    f"${LEASE_TOKEN}.",
)
worker = click.option(
    "--worker", metavar="NAME", help="The lease by its worker's name instead, for whoever made it; with --namespace."
)


def duration(_ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A callback of click for a Go duration.

    Raises:
        InvalidInput: It is none; the message names the option.
    """
    durations.parse(value, field=param.opts[0])
    return value


def older_identity(command: F) -> F:
    """The options by which the older bkctl said who is calling: a development issuer then makes a token of them."""
    flags = ("--oidc-actor", "--oidc-repository", "--oidc-subject")
    return reduce(
        lambda made, flag: click.option(flag, hidden=True, expose_value=False, callback=_remember)(made),
        flags,
        command,
    )


def asked() -> Asked:
    """What the options of `older_identity` said in the command that runs."""
    return Asked(**click.get_current_context().meta.get(_ASKED, {}))


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    ctx.meta.setdefault(_ASKED, {})[str(param.name).removeprefix("oidc_")] = value


def lease(given: str | None, worker: str | None, namespace: str) -> Lease:
    """The lease that `--worker`, or else `--token`, names. Raises as lease_token does."""
    if worker is None:
        return lease_token(given)
    if _from_argv("token"):
        raise InvalidInput("--worker: --token names a lease, too", hint="Give one of them.", field="--worker")
    return NamedLease(worker, namespace)


def _from_argv(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.COMMANDLINE


def lease_token(given: str | None) -> str:
    """The token that `--token` points to.

    Raises:
        InvalidInput: Nothing is given, or there is no token where it points to. The message never quotes it: it might
            be a token with a typing error.
        NotFound: It looks like a file and there is none.
    """
    if not given:
        raise InvalidInput(
            "--token: no lease is named",
            hint=f"Give `--token -` and the token on stdin, `--token FILE`, ${LEASE_TOKEN}, or --worker NAME.",
            field="--token",
        )
    if given == "-":
        return _token_in(sys.stdin.read(_LONGEST_FILE), "stdin")
    if tokens.well_formed(given) and not given.startswith("@"):
        return given
    path = Path(given.removeprefix("@"))
    path = path / LEASE_FILE if path.is_dir() else path
    try:
        with path.open(encoding="utf-8") as file:
            return _token_in(file.read(_LONGEST_FILE), str(path))
    except FileNotFoundError:
        if given.startswith("@") or os.sep in given:
            raise NotFound(
                f"--token: there is no file {path}", hint="`allocate --out DIR` writes it.", field="--token"
            ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--token: {path} cannot be read ({error})", field="--token") from None
    raise InvalidInput(
        "--token: is neither a token nor a file",
        hint="A token has 43 characters; a file may hold it, or the JSON that `allocate` wrote.",
        field="--token",
    )


def _token_in(text: str, source: str) -> str:
    token: object = text.strip()
    if text.lstrip().startswith("{"):
        try:
            token = json.loads(text)["token"]
        except (ValueError, KeyError):
            token = None
    if isinstance(token, str) and tokens.well_formed(token):
        return token
    raise InvalidInput(
        f"--token: there is no token in {source}",
        hint="It is the 43 characters of the field `token` that `allocate` answers with, or that whole JSON.",
        field="--token",
    )
