"""`bkpool pool`: deletes a pool of the appliance that runs. Only the admin may do this."""

from __future__ import annotations

import sys

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client
from bkpool.core.names import check_name


@click.group(short_help="Delete a pool.")
def command() -> None:
    """Delete a pool. `bkpool status` shows pools, and files of `bkpool up -f` make and change them."""


@command.command(short_help="Delete a pool; its leases may end first.")
@click.argument("name")
@click.option("--now", is_flag=True, help="Cut its builds, and delete its caches at once.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask first.")
@options.namespace
@options.as_json
def delete(*, name: str, now: bool, yes: bool, namespace: str, as_json: bool) -> int:
    """Delete a pool.

    From now on it gives no lease, and nobody but the admin may use it. The leases that it has go on. Its caches are
    deleted 24 hours after the last one. With --now builds are cut, and nothing is kept.

    A pool of a file comes back with the next `bkpool up -f` that names it, so take it out of the file, too. Where
    pools are custom resources (kind, Kubernetes), this says how to delete one with kubectl.
    """
    check_name(name, field="NAME")
    if not yes and not _confirmed(name, namespace, now=now):
        console.note("nothing was changed")
        return 1
    answer = Client().delete_pool(name, namespace, now=now)
    console.answer(answer, as_json=as_json, show=lambda: f"pool {namespace}/{name}: {answer.get('message')}")
    return 0


def _confirmed(name: str, namespace: str, *, now: bool) -> bool:
    """Asks on a terminal. Without one, whoever calls knows what they do."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    what = "cut its builds and delete its caches" if now else "and, 24 hours after its last lease, its caches"
    return click.confirm(f"Delete pool {namespace}/{name}, {what}?", err=True)
