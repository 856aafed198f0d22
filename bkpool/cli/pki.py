"""`bkpool pki`: shows the certificate authority of an appliance, and replaces it.

The keys never leave the home or the cluster, and are never shown.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bkpool.cli import console, home, options, up_options
from bkpool.core.errors import HostFault, NotFound
from bkpool.home.lock import holder

if TYPE_CHECKING:
    from bkpool.appliance.ca_rotation import AuthorityState

F = TypeVar("F", bound=Callable[..., Any])


@click.group(short_help="Show or replace the certificate authority.")
def command() -> None:
    """Show or replace the certificate authority of an appliance."""


def _where(command: F) -> F:
    for option in (
        options.as_json,
        click.option("--namespace", "kubernetes_namespace", metavar="NAME", help="The namespace of the appliance."),
        click.option("--context", "kubernetes_context", metavar="NAME", help="The context in the kubeconfig."),
        click.option("--kubeconfig", "kubernetes_kubeconfig", metavar="FILE", help="The kubeconfig of the cluster."),
        click.option(
            "--backend",
            type=click.Choice(["process", "kind", "kubernetes"]),
            help="Where the authority is; kubernetes: in a cluster.  [default: the backend of this home]",
        ),
    ):
        command = option(command)
    return command


@command.command(short_help="Show the certificate authority, and how far its last rotation is.")
@_where
def show(*, backend: str | None, as_json: bool, **given: str | None) -> None:
    """Show the certificate authority, and whether the one before its last rotation is still trusted."""
    state = _carry_out(backend, given, rotate=False)
    console.answer(state.to_json(), as_json=as_json, show=partial(_text, state))


@command.command(short_help="Replace the certificate authority by a new one.")
@_where
def rotate(*, backend: str | None, as_json: bool, **given: str | None) -> None:
    """Replace the certificate authority by a new one.

    Leases go on. The old authority is trusted together with the new one until the last earlier lease has ended. An
    appliance on this machine must be stopped first. In a cluster its pods are replaced one after the other.
    """
    state = _carry_out(backend, given, rotate=True)
    console.answer(state.to_json(), as_json=as_json, show=partial(_text, state))


def _carry_out(backend: str | None, given: dict[str, str | None], *, rotate: bool) -> AuthorityState:
    import asyncio  # noqa: PLC0415 - `--help` is fast without these

    from bkpool.appliance.ca_rotation import of_cluster, of_home  # noqa: PLC0415
    from bkpool.kube import ClusterAccess  # noqa: PLC0415

    place = home.home()
    record = place / "backend"
    backend = backend or (record.read_text("utf-8", "replace").strip() if record.exists() else None)
    if backend is None:
        raise NotFound(f"{place} has no appliance", hint="For one in a cluster give --backend kubernetes.")
    if rotate and (pid := holder(place)) is not None:
        raise HostFault(
            f"bkpool is running in {place} (pid {pid}), and it would not notice the new authority",
            hint="Stop it with `bkpool down`, rotate, and start it again.",
            code="AlreadyRunning",
        )
    if backend == "process":
        return asyncio.run(of_home(place, rotate=rotate))
    resolved = up_options.load(given)
    kubernetes = resolved.settings.kubernetes
    access = (
        ClusterAccess(place / "kubeconfig")
        if backend == "kind"
        else ClusterAccess(
            kubernetes.kubeconfig,
            kubernetes.context,
            kubeconfig_from=resolved.places.get("kubernetes.kubeconfig", "--kubeconfig"),
            context_from=resolved.places.get("kubernetes.context", "--context"),
        )
    )
    return asyncio.run(of_cluster(access, kubernetes.namespace, rotate=rotate))


def _text(state: AuthorityState) -> str:
    lines = [f"authority {state.authority.mark}, valid until {state.authority.not_after:%Y-%m-%d}"]
    if state.former is not None:
        trusted = "is trusted until earlier leases have ended" if state.overlaps else "is not trusted any more"
        lines.append(
            f"rotated at {state.former.rotated_at:%Y-%m-%d %H:%M} UTC; {state.former.authority.mark} {trusted}"
        )
    if state.namespaces is not None:
        named = f"in the namespaces {', '.join(state.namespaces)}" if state.namespaces else "in all namespaces"
        lines.append(f"the leases that count are those {named}")
    if state.restarted:
        lines.append("the pods of the appliance are being replaced, to read it")
    return "\n".join(lines)
