"""Renders what `bkpool manifests` prints: everything that the appliance needs in a cluster, as readable YAML.

The text is in templates/ and crds/, beside this module, which only fills in names. The same options always give
exactly the same text.
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
"""bkpool's own image in this version, built from the Containerfile."""
CONTROLLER = "buildkit-controller"
"""The name of the appliance's Deployment, Service and ServiceAccount, and the value of its pods' name label."""
MAX_REPLICAS = 100

_SELECTOR = f"{{app.kubernetes.io/name: {CONTROLLER}}}"
_LABELS = f"{{app.kubernetes.io/name: {CONTROLLER}, app.kubernetes.io/part-of: bkpool}}"
_CLEAR = """\
            # The API is served without TLS: anyone who can read the traffic between pods can read bearer tokens, and
            # the keys of clients that sent no csr. The NetworkPolicy below limits who may connect. If you do not
            # trust the network, use `bkpool manifests --api-tls`.
            - --plain-http
"""
_TLS = """\
            # The certificate is signed by bkpool's CA. Callers trust ca.crt of the Secret bkpool-pki
            # (BKCTL_TLS_CA_CERT).
            - --api-tls
"""
_IMAGE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}"
)  # the characters of an image's name; none of them needs quotes in YAML


@dataclass(frozen=True, slots=True)
class Install:
    """How the appliance should run in a cluster."""

    namespace: str = SYSTEM_NAMESPACE
    replicas: int = 2
    image: str = IMAGE
    pool_namespaces: tuple[str, ...] = (DEFAULT_NAMESPACE,)
    """The namespaces that may contain pools. The controller has no right to create workers elsewhere."""
    api_tls: bool = False
    """Whether the API is served over TLS, with a certificate of bkpool's own CA."""


def render(install: Install) -> str:
    """The manifests, one YAML stream.

    Raises:
        InvalidInput: A name or the number of replicas is not valid; `field` is the option.
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
    """The command line that gives this text, for a reader who finds the file later."""
    pools = [f"--pool-namespace {name}" for name in install.pool_namespaces]
    parts = [f"--namespace {install.namespace}", f"--replicas {install.replicas}", f"--image {install.image}", *pools]
    return " ".join([*parts, *(["--api-tls"] if install.api_tls else [])])


def _check(install: Install) -> None:
    check_name(install.namespace, field="--namespace")
    for name in install.pool_namespaces:
        check_name(name, field="--pool-namespace")
    if not 1 <= install.replicas <= MAX_REPLICAS:
        raise InvalidInput(
            f"--replicas: {install.replicas} is not between 1 and {MAX_REPLICAS}",
            hint="Use 2: two replicas survive the loss of a node.",
            field="--replicas",
        )
    if _IMAGE.fullmatch(install.image) is None:
        raise InvalidInput(
            f"--image: {install.image[:80]!r} is not a valid image name",
            hint=f"Write it as {IMAGE}.",
            field="--image",
        )
