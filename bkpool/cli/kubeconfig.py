"""`bkpool kubeconfig`: shows the kubeconfig of the kind cluster of this home. The kubeconfig of the user is separate.

It reads one file and changes nothing.
"""

from __future__ import annotations

import shlex

import click

from bkpool.cli import console, home, options
from bkpool.core.errors import NotFound
from bkpool.home.files import read_private


@click.command(short_help="Show how kubectl reaches the cluster of this home.")
@click.option("--raw", is_flag=True, help="Print the kubeconfig itself.")
@options.as_json
def command(raw: bool, as_json: bool) -> None:
    """Show how kubectl reaches the kind cluster of this home.

    The cluster has a separate kubeconfig. bkpool does not change your ~/.kube/config or its current context.
    """
    path = home.home() / "kubeconfig"
    if not path.is_file():
        raise NotFound(
            f"there is no kubeconfig in {home.home()}: this home has no kind cluster",
            hint="`bkpool up --backend kind` makes a cluster. The backend `kubernetes` uses your kubeconfig.",
        )
    if raw:
        click.echo(read_private(path), nl=False)
        return
    quoted = shlex.quote(str(path))
    lines = [str(path), "", f"  export KUBECONFIG={quoted}", f"  kubectl --kubeconfig {quoted} get pods -A"]
    console.answer({"kubeconfig": str(path)}, as_json=as_json, show=lambda: "\n".join(lines))
