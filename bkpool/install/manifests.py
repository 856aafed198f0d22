"""Renders what `bkpool manifests` prints: everything that the appliance needs in a cluster, as readable YAML.

The text is in templates/ and crds/, beside this module, which only fills in names. The same options always give
exactly the same text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from bkpool import __version__
from bkpool.core.allowances import Allowances
from bkpool.core.errors import InvalidInput
from bkpool.core.names import DEFAULT_NAMESPACE, SYSTEM_NAMESPACE, check_name
from bkpool.install import crds, pool_policy
from bkpool.install.pool_policy import allow_options

IMAGE = f"ghcr.io/smrt-devops/bkpool:{__version__}"
"""bkpool's own image in this version, built from the Containerfile."""
CONTROLLER = "buildkit-controller"
"""The name of the appliance's Deployment, Service and ServiceAccount, and the value of its pods' name label."""
MAX_REPLICAS = 100
FIRST_WITH_POLICIES = "1.30"
"""The first version of Kubernetes that has ValidatingAdmissionPolicies without a feature gate."""
_FIRST_WITH_PRIORITIES = "1.29"
"""The first version with FlowSchemas in their final form."""

_SELECTOR = f"{{app.kubernetes.io/name: {CONTROLLER}}}"
_LABELS = f"{{app.kubernetes.io/name: {CONTROLLER}, app.kubernetes.io/part-of: bkpool}}"
_CLEAR = """\
            # The API is served without TLS: anyone who can read the traffic between pods can read bearer tokens, and
            # the keys of clients that sent no csr. The NetworkPolicy below limits who may connect. If you do not
            # trust the network, use `bkpool manifests --api-tls`.
            - --plain-http
"""
_TLS = """\
            # The certificate is signed by a CA of its own. Callers trust ca.crt of the Secret bkpool-api-ca
            # (BKCTL_TLS_CA_CERT). No certificate of a pool's gateway is signed by it.
            - --api-tls
"""
_NO_POLICY = f"""\
# The ValidatingAdmissionPolicy for pools is left out: it needs Kubernetes {FIRST_WITH_POLICIES}. The controller still
# checks pools.
"""
_NO_PRIORITIES = f"""\
# The FlowSchemas are left out, and their priority level too: they need Kubernetes {_FIRST_WITH_PRIORITIES}.
"""
_VERSION = re.compile(r"v?(\d{1,3})\.(\d{1,4})(\.\d+)?(?:[-+][0-9A-Za-z.+-]*)?\Z")
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
    """The namespaces that may contain pools. The controller sees no pool elsewhere, and has no right to."""
    api_tls: bool = False
    """Whether the API is served over TLS, with a certificate of a CA that signs nothing else."""
    allowed: Allowances = Allowances()  # noqa: RUF009 - immutable
    """What pools may ask for."""
    kubernetes_version: str = FIRST_WITH_POLICIES
    """The oldest version of Kubernetes in which the manifests must work."""
    definitions: bool = True
    """Whether the custom resource definitions are among them. The installations of a cluster share one set."""


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
        pod_security="privileged" if install.namespace in namespaces else "restricted",
        allowed="".join(f'            - "{option}={value}"\n' for option, value in allow_options(install.allowed)),
        pool_namespaces="".join(f"            - --pool-namespace={name}\n" for name in namespaces),
        transport=_TLS if install.api_tls else _CLEAR,
        scheme=", scheme: HTTPS" if install.api_tls else "",
        callers=f"[{', '.join(dict.fromkeys((install.namespace, *namespaces)))}]",
    )
    pools = [_fill("pool-namespace.yaml", namespace=name, appliance=install.namespace) for name in namespaces]
    policy = pool_policy.render(install.allowed, install.namespace, namespaces, _LABELS)
    if not _is_at_least(install.kubernetes_version, FIRST_WITH_POLICIES):
        policy = _NO_POLICY
    definitions = crds.texts() if install.definitions else ()
    return _stream([appliance, *definitions, *pools, policy, _priority(install, namespaces)])


def _priority(install: Install, namespaces: Sequence[str]) -> str:
    """How the API server divides its time between this installation and everything else."""
    if not _is_at_least(install.kubernetes_version, _FIRST_WITH_PRIORITIES):
        return _NO_PRIORITIES
    accounts = "".join(
        f'        - kind: ServiceAccount\n          serviceAccount: {{name: "*", namespace: "{name}"}}\n'
        for name in namespaces
    )
    listed = "[" + ", ".join(f'"{name}"' for name in namespaces) + "]"
    return _fill("priority.yaml", appliance=install.namespace, accounts=accounts, namespaces=listed)


def _fill(name: str, **values: str) -> str:
    text = (files("bkpool.install") / "templates" / name).read_text("utf-8")
    return Template(text).substitute(values, labels=_LABELS)


def _stream(documents: Sequence[str]) -> str:
    return "---\n".join(documents)


def _options(install: Install) -> str:
    """The command line that gives this text, for a reader who finds the file later."""
    pools = [f"--pool-namespace {name}" for name in install.pool_namespaces]
    parts = [f"--namespace {install.namespace}", f"--replicas {install.replicas}", f"--image {install.image}", *pools]
    parts += ["--api-tls"] if install.api_tls else []
    parts += [] if install.definitions else ["--no-crds"]
    if install.kubernetes_version != FIRST_WITH_POLICIES:
        parts.append(f"--kubernetes-version {install.kubernetes_version}")
    return " ".join([*parts, *(f"{option} {shlex.quote(value)}" for option, value in allow_options(install.allowed))])


def _is_at_least(version: str, first: str) -> bool:
    """Whether a version of Kubernetes has what came with `first`."""
    return _numbers(version) >= _numbers(first)


def _numbers(version: str) -> tuple[int, int]:
    match = _VERSION.match(version)
    if match is None:
        raise InvalidInput(
            f"--kubernetes-version: {version[:40]!r} is not a version",
            hint="Write it as 1.30.",
            field="--kubernetes-version",
        )
    return int(match[1]), int(match[2])


def _check(install: Install) -> None:
    _numbers(install.kubernetes_version)
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
