"""`bkpool manifests`: prints what the appliance needs in a cluster. It asks no cluster and changes nothing."""

from __future__ import annotations

import click

from bkpool.core.names import DEFAULT_NAMESPACE, SYSTEM_NAMESPACE


@click.command(short_help="Print the manifests of an appliance in a cluster.")
@click.option("--namespace", default=SYSTEM_NAMESPACE, show_default=True, help="Where the appliance is to run.")
@click.option("--replicas", type=int, default=2, show_default=True, help="Of the API; one of them is the controller.")
@click.option("--image", metavar="IMAGE", help="bkpool's own image.  [default: the one of this version]")
@click.option(
    "--pool-namespace",
    "pool_namespaces",
    metavar="NAME",
    multiple=True,
    default=(DEFAULT_NAMESPACE,),
    show_default=True,
    help="A namespace in which there may be pools; repeatable. It must exist.",
)
@click.option("--api-tls", is_flag=True, help="Serve the API over TLS, certified by bkpool's own CA.")
def command(
    *, namespace: str, replicas: int, image: str | None, pool_namespaces: tuple[str, ...], api_tls: bool
) -> None:
    """Print the manifests of an appliance in a cluster, as YAML: for `bkpool manifests | kubectl apply -f -`."""
    from bkpool.install.manifests import IMAGE, Install, render  # noqa: PLC0415 - what others need not wait for

    install = Install(namespace, replicas, image or IMAGE, pool_namespaces, api_tls)
    click.echo(render(install), nl=False)
