"""`bkpool manifests`: prints the manifests of an appliance. It connects to no cluster and changes nothing."""

from __future__ import annotations

import click

from bkpool.core.names import DEFAULT_NAMESPACE, SYSTEM_NAMESPACE


@click.command(short_help="Print the manifests of an appliance in a cluster.")
@click.option("--namespace", default=SYSTEM_NAMESPACE, show_default=True, help="The namespace of the appliance.")
@click.option(
    "--replicas",
    type=int,
    default=2,
    show_default=True,
    help="Replicas of the API; one of them also runs the controller.",
)
@click.option("--image", metavar="IMAGE", help="The image of bkpool.  [default: bkpool's image of this release]")
@click.option(
    "--pool-namespace",
    "pool_namespaces",
    metavar="NAME",
    multiple=True,
    default=(DEFAULT_NAMESPACE,),
    show_default=True,
    help="A namespace that may have pools; it must exist. Repeatable.",
)
@click.option("--api-tls", is_flag=True, help="Serve the API over TLS, with a certificate of bkpool's own authority.")
def command(
    *, namespace: str, replicas: int, image: str | None, pool_namespaces: tuple[str, ...], api_tls: bool
) -> None:
    """Print the manifests of an appliance in a cluster, as YAML.

    As in: bkpool manifests | kubectl apply -f -
    """
    from bkpool.install.manifests import IMAGE, Install, render  # noqa: PLC0415 - other commands start faster without it

    install = Install(namespace, replicas, IMAGE if image is None else image, pool_namespaces, api_tls)
    click.echo(render(install), nl=False)
