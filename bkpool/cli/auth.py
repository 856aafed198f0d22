"""`bkpool auth`: whether a token's holder may use a pool, and why; and which issuers are believed.

The token is read from a file or stdin, and shown nowhere.
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


@click.group(short_help="Explain who may use a pool, and who is believed.")
def command() -> None:
    """Explain who may use a pool, and who is believed."""


@command.command(short_help="Ask whether a token's holder may use a pool, and why.")
@click.option("--token-file", required=True, metavar="FILE", help="Where the bearer token is; `-` is stdin.")
@click.option("-p", "--pool", required=True, help="The pool it is about.")
@options.namespace
@options.as_json
def check(*, token_file: str, pool: str, namespace: str, as_json: bool) -> int:
    """Ask whether the holder of a bearer token may use a pool, and why.

    The exit code is 0 if so, 4 if not, and 3 if the token is nobody's here.
    """
    told = Client().check(_token(token_file), pool, namespace)
    console.answer(told, as_json=as_json, show=lambda: _shown(told))
    if told.get("allowed"):
        return 0
    return Forbidden.default_exit if told.get("identity") else Unauthenticated.default_exit


@command.command(short_help="List the configured issuers, and whether each works.")
@options.as_json
def issuers(*, as_json: bool) -> None:
    """List the issuers of callers' tokens that are configured here, and whether each works. For the admin."""
    told = Client().issuers()
    console.answer(told, as_json=as_json, show=lambda: _listed(told.get("issuers") or []))


def _listed(issuers: list[dict[str, Any]]) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - on a terminal only
    from rich.text import Text  # noqa: PLC0415

    names = [f"{one.get('namespace')}/{one.get('name')}" for one in issuers]
    rows = (
        (name, "yes" if one.get("ready") else "no", str(one.get("audience")), str(one.get("issuer")))
        for name, one in zip(names, issuers, strict=True)
    )
    remarks = (
        Text(f"{name}: {one.get('message') or 'not looked at yet'}", style="yellow")
        for name, one in zip(names, issuers, strict=True)
        if not one.get("ready")
    )
    return Group(console.table(("name", "ready", "audience", "issuer"), rows, long={"issuer"}), *remarks)


def _token(file: str) -> str:
    source = "--token-file"
    if file == "-":
        return credentials.checked(sys.stdin.read(credentials.LONGEST + 2).strip(), source)
    return credentials.checked(credentials.read(Path(file), source), source)


def _shown(told: dict[str, Any]) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - on a terminal only
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    allowed = bool(told.get("allowed"))
    head = Text("allowed" if allowed else "denied", style="green" if allowed else "red")
    table = Table.grid(padding=(0, 2))
    for row in _rows(told):
        table.add_row(*map(Text, row))  # Text, so that nothing in a claim is taken for rich's markup
    return Group(head.append(f": {told.get('reason')}", style="default"), table)


def _rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    identity = told.get("identity") or {}
    named = [(name, identity.get(name)) for name in ("name", "authority", "source", "groups", "pools", "tenant")]
    rows = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in named if value]
    judged = [
        (str(verdict.get("source")), str(verdict.get("reason") or ("known" if verdict.get("known") else "not known")))
        for verdict in told.get("verdicts") or ()
    ]
    return rows + judged
