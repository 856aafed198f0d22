"""`bkpool status`: shows the pools, or one pool with its workers, as the API reports them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from bkpool.cli import console, options
from bkpool.cli.client import Client
from bkpool.core.names import check_name

if TYPE_CHECKING:
    from rich.console import RenderableType

_LONG = frozenset({"job", "holder", "message"})
_STYLES = {"Idle": "green", "Allocated": "cyan", "Failed": "red", "Draining": "yellow"}


@click.command(short_help="Show the pools, or one pool with its workers.")
@click.option("-p", "--pool", help="Show only this pool, with its workers.")
@options.namespace
@options.as_json
@options.older_identity
def command(pool: str | None, namespace: str, as_json: bool) -> None:
    """Show the pools, or one pool with its workers.

    With --namespace and without --pool, this shows the pools of that namespace. BKCTL_NAMESPACE has no such effect.
    """
    of_namespace = check_name(namespace, field="--namespace") if options.from_argv("namespace") else None
    client = Client(claims=options.claims())
    if pool is None:
        answer = client.pools()
        if of_namespace is not None:
            answer["pools"] = [one for one in answer.get("pools", []) if one.get("namespace") == of_namespace]
        console.answer(answer, as_json=as_json, show=lambda: _pools_of(answer.get("pools", []), of_namespace))
        return
    answer = client.pool(pool, namespace)
    console.answer(answer, as_json=as_json, show=lambda: _pool_with_workers(answer))


def _pools_of(pools: Sequence[dict[str, Any]], namespace: str | None) -> RenderableType | str:
    if pools:
        return _pools(pools)
    where = f" in namespace {namespace!r}" if namespace else ""
    return f"there is no pool{where} that you may use"


def _pool_with_workers(pool: dict[str, Any]) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - on a terminal only

    return Group(_pools([pool]), "", _workers(pool.get("members", [])))


def _pools(pools: Sequence[dict[str, Any]]) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - on a terminal only
    from rich.text import Text  # noqa: PLC0415

    rows = [
        (
            f"{pool.get('namespace')}/{pool.get('name')}",
            f"{pool.get('workers')} of {pool.get('max')}",
            *(str(pool.get(name)) for name in ("ready", "idle", "allocated", "waiting", "connections")),
        )
        for pool in pools
    ]
    headers = ("pool", "workers", "ready", "idle", "allocated", "waiting", "connections")
    remarks = [
        Text(f"{pool.get('name')}: {condition['message']}", style="yellow")
        for pool in pools
        for condition in pool.get("conditions") or ()
        if condition.get("message") and not (condition.get("type") == "Ready" and condition.get("status") == "True")
    ]
    gateways = dict.fromkeys(str(pool.get("gatewayEndpoint")) for pool in pools)
    return Group(
        console.table(headers, rows, long=_LONG),
        *(Text(f"gateway {gateway}", style="dim") for gateway in gateways),
        *remarks,
    )


def _workers(workers: Sequence[dict[str, Any]]) -> RenderableType:
    from rich.text import Text  # noqa: PLC0415 - on a terminal only

    rows = (
        (
            str(worker.get("name")),
            Text(str(worker.get("phase")), style=_STYLES.get(str(worker.get("phase")), "")),
            str(worker.get("jobId") or ""),
            str(worker.get("requestedBy") or ""),
            _from_now(worker.get("expiresAt")),
            str(worker.get("message") or ""),
        )
        for worker in workers
    )
    return console.table(("worker", "phase", "job", "holder", "expires", "message"), rows, long=_LONG)


def _from_now(moment: str | None) -> str:
    if not moment:
        return ""
    try:
        left = int((datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return moment
    return f"in {left // 3600}h{left % 3600 // 60:02}m" if left > 0 else "expired"
