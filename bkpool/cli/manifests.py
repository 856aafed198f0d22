"""`bkpool manifests`: prints the manifests of an appliance. It connects to no cluster and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from bkpool.core.names import DEFAULT_NAMESPACE, SYSTEM_NAMESPACE

F = TypeVar("F", bound=Callable[..., Any])


def _allow(option: str, parameter: str, metavar: str, text: str) -> Callable[[F], F]:
    """An option that allows pools something, as `bkpool.settings.allow_model` has it for `up`."""
    return click.option(option, parameter, metavar=metavar, multiple=True, help=f"{text} Repeatable.")


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
    metavar="NAMESPACE",
    multiple=True,
    default=(DEFAULT_NAMESPACE,),
    show_default=True,
    help="A namespace that may have pools; it must exist. Repeatable.",
)
@click.option("--api-tls", is_flag=True, help="Serve the API over TLS, with a certificate of its own authority.")
@_allow("--allow-host", "hosts", "NAMESPACE=NAME", "A host that certificates of gateways may have.")
@_allow("--allow-privileged", "privileged", "NAMESPACE", "A namespace whose pools may have privileged workers.")
@_allow("--allow-image", "images", "NAMESPACE=PATTERN", "Images that pools of a namespace may name.")
@_allow("--allow-load-balancer", "load_balancers", "NAMESPACE", "A namespace whose pools may have a LoadBalancer.")
@_allow(
    "--allow-service-annotations",
    "service_annotations",
    "NAMESPACE",
    "A namespace whose pools may annotate their Service.",
)
@click.option(
    "--kubernetes-version",
    metavar="VERSION",
    default="1.30",
    show_default=True,
    help="The oldest version of Kubernetes that the manifests must work with. Below 1.30 the API server does not "
    "check pools itself; the controller always does. Below 1.29 there is no priority level of its own.",
)
@click.option(
    "--crds/--no-crds",
    "definitions",
    default=True,
    show_default=True,
    help="Print the custom resource definitions, too. The installations of a cluster share one set of them.",
)
def command(
    *,
    namespace: str,
    replicas: int,
    image: str | None,
    pool_namespaces: tuple[str, ...],
    api_tls: bool,
    kubernetes_version: str,
    definitions: bool,
    **allowed: tuple[str, ...],
) -> None:
    """Print the manifests of an appliance in a cluster, as YAML.

    As in: bkpool manifests | kubectl apply -f -
    """
    from bkpool.core.allowances import read_allowances  # noqa: PLC0415 - other commands start faster without it
    from bkpool.install.manifests import IMAGE, Install, render  # noqa: PLC0415 - as above

    install = Install(
        namespace,
        replicas,
        IMAGE if image is None else image,
        pool_namespaces,
        api_tls,
        read_allowances(**allowed),
        kubernetes_version,
        definitions,
    )
    click.echo(render(install), nl=False)
