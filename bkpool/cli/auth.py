"""`bkpool auth`: whether the caller with a token may use a pool, and why; and which issuers are trusted.

The token is read from a file or stdin. It is never shown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bkpool.cli import console, credentials, options
from bkpool.cli.client import Client
from bkpool.core.errors import Forbidden, Unauthenticated

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.group(short_help="Explain who may use a pool, and which issuers are trusted.")
def command() -> None:
    """Explain who may use a pool, and which issuers are trusted."""


@command.command(short_help="Check whether the caller with a token may use a pool.")
@click.option("--token-file", required=True, metavar="FILE", help="The file with the bearer token; `-` is stdin.")
@click.option("-p", "--pool", required=True, help="The pool to check.")
@options.namespace
@options.as_json
def check(*, token_file: str, pool: str, namespace: str, as_json: bool) -> int:
    """Check whether the caller with a bearer token may use a pool, and why.

    The exit code is 0 if they may, 4 if they may not, and 3 if this appliance does not know the token.
    """
    answer = Client().check(_token(token_file), pool, namespace)
    console.answer(answer, as_json=as_json, show=lambda: _explanation(answer))
    if answer.get("allowed"):
        return 0
    return Forbidden.default_exit if answer.get("identity") else Unauthenticated.default_exit


@command.command(short_help="List the configured issuers, and whether each works.")
@options.as_json
def issuers(*, as_json: bool) -> None:
    """List the configured issuers of tokens, and whether each works. Only the admin may ask this."""
    answer = Client().issuers()
    console.answer(answer, as_json=as_json, show=lambda: _issuer_table(answer.get("issuers") or []))


def _issuer_table(issuers: list[dict[str, Any]]) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - on a terminal only
    from rich.text import Text  # noqa: PLC0415

    names = [f"{one.get('namespace')}/{one.get('name')}" for one in issuers]
    rows = (
        (name, "yes" if one.get("ready") else "no", str(one.get("audience")), str(one.get("issuer")))
        for name, one in zip(names, issuers, strict=True)
    )
    remarks = (
        Text(f"{name}: {one.get('message') or 'not checked yet'}", style="yellow")
        for name, one in zip(names, issuers, strict=True)
        if not one.get("ready")
    )
    return Group(console.table(("name", "ready", "audience", "issuer"), rows, long={"issuer"}), *remarks)


def _token(file: str) -> str:
    source = "--token-file"
    if file == "-":
        return credentials.checked(sys.stdin.read(credentials.MAX_TOKEN_LENGTH + 2).strip(), source)
    return credentials.checked(credentials.read(Path(file), source), source)


def _explanation(answer: dict[str, Any]) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - on a terminal only
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    allowed = bool(answer.get("allowed"))
    head = Text("allowed" if allowed else "denied", style="green" if allowed else "red")
    table = Table.grid(padding=(0, 2))
    for row in _rows(answer):
        table.add_row(*map(Text, row))  # Text, so that rich takes nothing in a claim for markup
    return Group(head.append(f": {answer.get('reason')}", style="default"), table)


def _rows(answer: dict[str, Any]) -> list[tuple[str, str]]:
    identity = answer.get("identity") or {}
    named = [(name, identity.get(name)) for name in ("name", "authority", "source", "groups", "pools", "tenant")]
    rows = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in named if value]
    verdicts = [
        (str(verdict.get("source")), str(verdict.get("reason") or ("known" if verdict.get("known") else "not known")))
        for verdict in answer.get("verdicts") or ()
    ]
    return rows + verdicts
