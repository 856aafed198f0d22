"""The options that several commands share, and the methods to pass a token without writing it in a command line."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from bkpool.cli.client import LeaseReference, NamedLease
from bkpool.cli.credentials import RequestedClaims
from bkpool.cli.places import where
from bkpool.core import durations, tokens
from bkpool.core.errors import InvalidInput, NotFound
from bkpool.core.names import DEFAULT_NAMESPACE, DEFAULT_WAIT

F = TypeVar("F", bound=Callable[..., Any])

LEASE_TOKEN = "BKPOOL_LEASE_TOKEN"  # noqa: S105 - the name of a variable
LEASE_FILE = "lease.json"
"""The lease without its key, in the directory of `allocate --out`."""
_MAX_FILE = 1 << 20  # bytes
_CLAIMS = "bkpool.claims"

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
    "--json", "as_json", is_flag=True, help="Answer in JSON. This is the default if stdout is not a terminal."
)
token = click.option(
    "-t",
    "--token",
    metavar="FROM",
    envvar=LEASE_TOKEN,
    help=f"Where the token of the lease is: `-` (stdin), a file with the token or with the JSON of `allocate`, the "
    f"directory of `allocate --out`, or the token itself (other users of this machine can then see it).  "
    f"[default: ${LEASE_TOKEN}]",
)
worker = click.option(
    "--worker",
    metavar="NAME",
    help="The worker of the lease, instead of --token; only for the caller who made the lease. With --namespace.",
)


def duration(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A callback of click for a Go duration. An option that was not given stays None.

    Raises:
        InvalidInput: It is not a duration; the message names the option.
    """
    if value is not None:
        durations.parse(value, field=where(param.opts[0]))
    return value


def wait(command: F) -> F:
    """The option --wait. Without it the appliance decides."""
    default = durations.render(DEFAULT_WAIT)
    shown = (
        "How long to wait for a free worker; 0s takes only one that is ready now.  "
        f"[default: {default}, or less if the appliance allows less]"
    )
    return click.option("--wait", default=None, callback=duration, help=shown)(command)


def older_identity(command: F) -> F:
    """Options of the older bkctl that name the caller. A development issuer makes a token from them."""
    flags = ("--oidc-actor", "--oidc-repository", "--oidc-subject")
    return reduce(
        lambda made, flag: click.option(flag, hidden=True, expose_value=False, callback=_collect)(made),
        flags,
        command,
    )


def claims() -> RequestedClaims:
    """The values of the options of `older_identity` in the command that runs."""
    return RequestedClaims(**click.get_current_context().meta.get(_CLAIMS, {}))


def _collect(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    ctx.meta.setdefault(_CLAIMS, {})[str(param.name).removeprefix("oidc_")] = value


def lease(given: str | None, worker: str | None, namespace: str) -> LeaseReference:
    """The lease that `--worker`, or else `--token`, names. Raises the same errors as `lease_token`."""
    if worker is None:
        return lease_token(given)
    if from_argv("token"):
        raise InvalidInput(
            "--worker: --token names a lease as well", hint="Give only one of the two.", field="--worker"
        )
    return NamedLease(worker, namespace)


def from_argv(parameter: str) -> bool:
    """Whether a parameter of the command that runs is in its command line, and not a default or from a variable."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.COMMANDLINE


def lease_token(given: str | None) -> str:
    """The token that `--token`, or its variable, points to.

    Raises:
        InvalidInput: No lease is named, or there is no token at that place. The message never quotes the value: it
            might be a mistyped token.
        NotFound: The value has the form of a path, and there is no such file.
    """
    if not given:
        raise InvalidInput(
            "--token: no lease is named",
            hint=f"Give `--token -` and the token on stdin, `--token FILE`, ${LEASE_TOKEN}, or --worker NAME.",
            field="--token",
        )
    if given == "-":
        return _token_in(sys.stdin.read(_MAX_FILE), "stdin")
    if tokens.well_formed(given) and not given.startswith("@"):
        return given
    path = Path(given.removeprefix("@"))
    path = path / LEASE_FILE if os.path.isdir(path) else path  # noqa: PTH112 - Path.is_dir raises on a long token
    try:
        with path.open(encoding="utf-8") as file:
            return _token_in(file.read(_MAX_FILE), str(path))
    except FileNotFoundError:
        if given.startswith("@") or os.sep in given:
            raise NotFound(
                f"{where('--token')}: there is no file {path}",
                hint="`allocate --out DIR` writes it.",
                field=where("--token"),
            ) from None
    except (OSError, ValueError) as error:
        if _can_name_a_file(error):
            why = getattr(error, "strerror", None) or "it is not text"
            raise InvalidInput(
                f"{where('--token')}: {path} cannot be read: {why}",
                hint="Name a file with the token, or with the JSON that `allocate` wrote.",
                field=where("--token"),
            ) from None
    raise InvalidInput(
        f"{where('--token')}: this is neither a token nor a file",
        hint="A token has 43 characters. A file must have the token, or the JSON that `allocate` wrote.",
        field=where("--token"),
    )


def _can_name_a_file(error: OSError | ValueError) -> bool:
    """Whether the value that led to this error may be shown. One that names no file may be a mistyped token."""
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return not too_long and isinstance(error, OSError | UnicodeDecodeError)  # else it has a null character


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
        f"{where('--token')}: there is no token in {source}",
        hint="Give the 43 characters of the field `token` in the answer of `allocate`, or that whole JSON.",
        field=where("--token"),
    )
