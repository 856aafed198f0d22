"""`bkpool revoke`: ends leases and cuts their builds. For the caller who made them, and for the admin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client
from bkpool.core.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType

_FIELDS = {
    "lease": "leaseId",
    "worker": "workerName",
    "identity": "identity",
    "tenant": "tenant",
    "pool": "poolName",
}
"""Option to field of the API. Exactly one is given."""
_IN_ONE_NAMESPACE = frozenset({"worker", "pool"})
"""What has a namespace. The others are looked for in all namespaces unless --namespace names one."""


@click.command(short_help="End leases and cut their builds.")
@click.option("--lease", metavar="ID", help="The lease with this id (`status -p POOL --json` has the ids).")
@click.option("--worker", metavar="NAME", help="The lease on this worker.")
@click.option("--identity", metavar="NAME", help="All leases that this caller made.")
@click.option("--tenant", metavar="NAME", help="All leases that use the caches of this tenant.")
@click.option("-p", "--pool", metavar="NAME", help="All leases of this pool.")
@options.namespace
@options.as_json
def command(*, namespace: str, as_json: bool, **selected: str | None) -> int:
    """End leases at once: open connections are cut, and the builds that use them.

    Give exactly one of the options that name leases. The admin can end every lease, other callers their own ones.
    Without --namespace, --lease, --identity and --tenant mean the leases of all namespaces.

    This does not take away the right to get a new lease. For that, change the rules or the tokens first
    (docs/access.md). `bkpool release` ends a lease without cutting its builds.
    """
    given = {option: value for option, value in selected.items() if value is not None}
    if len(given) != 1:
        typed = [f"--{option}" for option in given]
        raise InvalidInput(
            f"{' and '.join(typed)}: only one of these options can be given" if given else "no option names a lease",
            hint="Give one of --lease, --worker, --identity, --tenant and --pool.",
        )
    ((option, value),) = given.items()
    body = {_FIELDS[option]: value}
    if option in _IN_ONE_NAMESPACE or options.from_argv("namespace"):
        body["namespace"] = namespace
    answer = Client().revoke(body)
    failed = answer.get("failed", [])
    console.answer(answer, as_json=as_json, show=lambda: _shown(answer.get("revoked", []), failed, option, value))
    return Unavailable.default_exit if failed else 0


def _shown(
    revoked: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]], option: str, value: str
) -> RenderableType | str:
    if not revoked and not failed:
        return f"{option} {value} has no lease here, so nothing was ended"
    rows = [_row(lease, "revoked") for lease in revoked]
    rows += [_row(lease, f"not revoked: {lease.get('reason')}") for lease in failed]
    headers = ("worker", "job", "holder", "tenant", "result")
    return console.table(headers, rows, long={"job", "holder", "tenant", "result"})


def _row(lease: dict[str, Any], result: str) -> tuple[str, ...]:
    worker = f"{lease.get('namespace')}/{lease.get('workerName')}"
    return worker, *(str(lease.get(field) or "") for field in ("jobId", "requestedBy", "tenant")), result
