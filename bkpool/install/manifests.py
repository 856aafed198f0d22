"""What `bkpool manifests` prints: everything that the appliance needs in a cluster, as YAML for people.

The text is in install/ and crds/, beside this module; here only names are filled in. The same options give the same
text, to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from bkpool import __version__
from bkpool.core.errors import InvalidInput
from bkpool.core.names import DEFAULT_NAMESPACE, SYSTEM_NAMESPACE, check_name
from bkpool.install import crds

IMAGE = f"ghcr.io/smrt-devops/bkpool:{__version__}"
"""bkpool's own image, of this version: the Containerfile makes it."""
CONTROLLER = "buildkit-controller"
"""The name of the appliance's Deployment, Service and ServiceAccount, and of its pods' label."""
MOST_REPLICAS = 100

_SELECTOR = f"{{app.kubernetes.io/name: {CONTROLLER}}}"
_LABELS = f"{{app.kubernetes.io/name: {CONTROLLER}, app.kubernetes.io/part-of: bkpool}}"
_CLEAR = """\
            # The API is served without TLS: whoever can read the traffic between pods can read bearer tokens, and
            # keys of clients that sent no csr. The NetworkPolicy below limits who may connect. Where the network is
            # not to be trusted: `bkpool manifests --api-tls`.
            - --plain-http
"""
_TLS = """\
            # Certified by bkpool's CA: ca.crt in the Secret bkpool-pki is what callers trust (BKCTL_TLS_CA_CERT).
            - --api-tls
"""
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")  # what may stand in an image's name, and needs no quotes


@dataclass(frozen=True, slots=True)
class Install:
    """How the appliance is to run in a cluster."""

    namespace: str = SYSTEM_NAMESPACE
    replicas: int = 2
    image: str = IMAGE
    pool_namespaces: tuple[str, ...] = (DEFAULT_NAMESPACE,)
    """Where pools may be; the controller has no rights to make workers elsewhere."""
    api_tls: bool = False
    """The API is served over TLS, with certificates of bkpool's own CA."""


def render(install: Install) -> str:
    """The manifests, one YAML stream.

    Raises:
        InvalidInput: A name is none, or the replicas are too many or none; `field` is the option.
    """
    _check(install)
    namespaces = tuple(dict.fromkeys(install.pool_namespaces))
    appliance = _fill(
        "appliance.yaml",
        version=__version__,
        options=_options(install),
        namespace=install.namespace,
        replicas=str(install.replicas),
        image=install.image,
        selector=_SELECTOR,
        pool_namespaces="".join(f"            - --pool-namespace={name}\n" for name in namespaces),
        transport=_TLS if install.api_tls else _CLEAR,
        scheme=", scheme: HTTPS" if install.api_tls else "",
        callers=f"[{', '.join(dict.fromkeys((install.namespace, *namespaces)))}]",
    )
    pools = [_fill("pool-namespace.yaml", namespace=name, appliance=install.namespace) for name in namespaces]
    return _stream([appliance, *crds.texts(), *pools])


def _fill(name: str, **values: str) -> str:
    text = (files("bkpool.install") / "templates" / name).read_text("utf-8")
    return Template(text).substitute(values, labels=_LABELS)


def _stream(documents: Sequence[str]) -> str:
    return "---\n".join(documents)


def _options(install: Install) -> str:
    """The command line that gives this, for whoever finds the file later."""
    pools = [f"--pool-namespace {name}" for name in install.pool_namespaces]
    parts = [f"--namespace {install.namespace}", f"--replicas {install.replicas}", f"--image {install.image}", *pools]
    return " ".join([*parts, *(["--api-tls"] if install.api_tls else [])])


def _check(install: Install) -> None:
    check_name(install.namespace, field="--namespace")
    for name in install.pool_namespaces:
        check_name(name, field="--pool-namespace")
    if not 1 <= install.replicas <= MOST_REPLICAS:
        raise InvalidInput(
            f"--replicas: {install.replicas} is not from 1 to {MOST_REPLICAS}",
            hint="Two replicas survive the loss of a node.",
            field="--replicas",
        )
    if _IMAGE.fullmatch(install.image) is None:
        raise InvalidInput(
            f"--image: {install.image[:80]!r} is no name of an image",
            hint=f"Write it as {IMAGE}.",
            field="--image",
        )
