"""`bkpool kubeconfig`: where the kubeconfig of this home's kind cluster is, so that the user's own stays as it is.

It reads that one file and changes nothing.
"""

from __future__ import annotations

import shlex

import click

from bkpool.cli import console, home, options
from bkpool.core.errors import NotFound
from bkpool.home.files import read_private


@click.command(short_help="Say how kubectl reaches the cluster of this home.")
@click.option("--raw", is_flag=True, help="Print the kubeconfig itself.")
@options.as_json
def command(raw: bool, as_json: bool) -> None:
    """Say how kubectl reaches the kind cluster of this home.

    It has a kubeconfig of its own; your ~/.kube/config and its current context are left alone.
    """
    path = home.home() / "kubeconfig"
    if not path.is_file():
        raise NotFound(
            f"there is no kubeconfig in {home.home()}: no kind cluster was made from there",
            hint="`bkpool up --backend kind` makes one. The backend `kubernetes` uses your own kubeconfig.",
        )
    if raw:
        click.echo(read_private(path), nl=False)
        return
    quoted = shlex.quote(str(path))
    lines = [str(path), "", f"  export KUBECONFIG={quoted}", f"  kubectl --kubeconfig {quoted} get pods -A"]
    console.answer({"kubeconfig": str(path)}, as_json=as_json, show=lambda: "\n".join(lines))
