"""What the operator of a cluster allows the authors of pools in each namespace, and what of a pool is not allowed.

Somebody who may write a pool in one namespace is not the operator. What reaches beyond that namespace (a node, a name
that others trust, an address outside of the cluster) must be allowed to it. Pure: it reads no cluster and never
changes what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bkpool.core.errors import InvalidInput
from bkpool.core.ignored import is_foreign_gateway
from bkpool.core.names import ANNOTATION_ISOLATION, Key, check_name
from bkpool.core.plain_words import HOST
from bkpool.core.pool import Pool, ServiceType
from bkpool.core.wildcards import any_matches

PRIVILEGED = "privileged"
"""The isolation that gives a build the rights of root on its node."""
HUB = "docker.io/"
"""The registry of an image whose name has none."""

_HOST = re.compile(HOST)
_IMAGE_PATTERN = re.compile(r"[A-Za-z0-9*?][A-Za-z0-9._:/@*?-]{0,511}")
_SERVICE_LABEL = "svc"
_LEAST_LABELS = 3  # a shorter name may be that of a Service: name.namespace
_SHOWN = 120  # characters of an image's name in a message
_GATEWAY_SERVICE, _NETWORKING_SERVICE = "spec.gateway.serviceType", "spec.networking.serviceType"


class Allowed(NamedTuple):
    """One value that is allowed in one namespace: a host, or a pattern of images."""

    namespace: str
    value: str

    def __str__(self) -> str:
        return f"{self.namespace}={self.value}"


@dataclass(frozen=True, slots=True)
class Allowances:
    """What pools may ask for. By default nothing of it."""

    hosts: frozenset[Allowed] = frozenset()
    """Names and addresses that may be in the certificates of a namespace's gateways."""
    privileged: frozenset[str] = frozenset()
    """Namespaces whose workers may be privileged."""
    images: tuple[Allowed, ...] = ()
    """Patterns of the images that pools of a namespace may name."""
    load_balancers: frozenset[str] = frozenset()
    """Namespaces whose pools may have a Service of the type LoadBalancer."""
    service_annotations: frozenset[str] = frozenset()
    """Namespaces whose pools may annotate their Service."""
    own_images: frozenset[str] = frozenset()
    """The images that pools get without naming one. Each pool may name them, too."""


class Disallowed(NamedTuple):
    """A field of a pool that the operator has not allowed."""

    field: str
    why: str
    option: str
    """The option of `manifests` or `up` that allows it; empty if nothing does."""

    @property
    def message(self) -> str:
        """In one sentence."""
        allow = f"; the operator allows it with {self.option}" if self.option else ""
        return f"{self.field}: {self.why}{allow}"


def service_names(pool: Key) -> tuple[str, ...]:
    """The names that the cluster's DNS gives a pool's own Service."""
    service = f"{pool.name}.{pool.namespace}"
    return pool.name, service, f"{service}.svc", f"{service}.svc.cluster.local"


def may_name_a_service(host: str) -> bool:
    """Whether a DNS name could be that of a Service in the cluster."""
    labels = host.lower().rstrip(".").split(".")
    return _SERVICE_LABEL in labels or len(labels) < _LEAST_LABELS


def parse_host(text: str) -> Allowed:
    """Reads NAMESPACE=NAME of `--allow-host`.

    Raises:
        ValueError: It is not of this form, or the name is that of a Service.
    """
    namespace, host = _pair(text, "NAME")
    host = host.lower()
    if _HOST.fullmatch(host) is None:
        raise ValueError("has no DNS name or IP address after the =")
    if _SERVICE_LABEL in host.split("."):
        raise ValueError("has the name of a Service: each gateway has its own Service's names anyway, and no other's")
    return Allowed(namespace, host)


def parse_image(text: str) -> Allowed:
    """Reads NAMESPACE=PATTERN of `--allow-image`.

    Raises:
        ValueError: It is not of this form.
    """
    namespace, pattern = _pair(text, "PATTERN")
    if _IMAGE_PATTERN.fullmatch(pattern) is None:
        raise ValueError("has no pattern of image names after the =")
    return Allowed(namespace, pattern)


def read_allowances(
    *,
    hosts: Iterable[str] = (),
    privileged: Iterable[str] = (),
    images: Iterable[str] = (),
    load_balancers: Iterable[str] = (),
    service_annotations: Iterable[str] = (),
) -> Allowances:
    """Reads the options of `manifests`, each as `Allowances` names it.

    Raises:
        InvalidInput: A value is not of the form that its option has.
    """
    return Allowances(
        hosts=frozenset(_read(one, "--allow-host", parse_host) for one in hosts),
        privileged=frozenset(check_name(name, field="--allow-privileged") for name in privileged),
        images=tuple(_read(one, "--allow-image", parse_image) for one in images),
        load_balancers=frozenset(check_name(name, field="--allow-load-balancer") for name in load_balancers),
        service_annotations=frozenset(
            check_name(name, field="--allow-service-annotations") for name in service_annotations
        ),
    )


def host_refusals(pool: Pool, allowed: Allowances) -> tuple[Disallowed, ...]:
    """The name for the gateway's certificate that is not allowed; empty if there is none.

    Args:
        pool: The pool.
        allowed: What its operator allows.
    """
    external = pool.spec.networking.external
    host = (external.hostname or "").strip().lower()
    if not host or external.enabled is False or host in service_names(pool.key):
        return ()
    entry = Allowed(pool.key.namespace, host)
    if entry in allowed.hosts:
        return ()
    option = "" if _SERVICE_LABEL in host.split(".") else f"--allow-host {entry}"
    why = f"{host} is not allowed in namespace {entry.namespace}" if option else f"{host} is the name of a Service"
    return (Disallowed("spec.networking.external.hostname", why, option),)


def service_refusals(pool: Pool, allowed: Allowances) -> tuple[Disallowed, ...]:
    """What is not allowed of the pool's Service. Arguments as for `host_refusals`."""
    return tuple(_of_service(pool, allowed))


def worker_refusals(pool: Pool, allowed: Allowances) -> tuple[Disallowed, ...]:
    """What is not allowed of the pool's workers. Arguments as for `host_refusals`."""
    return tuple(_of_workers(pool, allowed))


def gateway_image_refusals(pool: Pool, allowed: Allowances) -> tuple[Disallowed, ...]:
    """Whether the image of the pool's gateway is not allowed. Arguments as for `host_refusals`."""
    image = pool.spec.gateway_image
    if image is None or is_foreign_gateway(image):
        return ()
    return tuple(_of_image("spec.gatewayImage", image, pool.key.namespace, allowed))


def refusals(pool: Pool, allowed: Allowances) -> tuple[Disallowed, ...]:
    """Everything that is not allowed, except the host. Arguments as for `host_refusals`."""
    return (
        *worker_refusals(pool, allowed),
        *gateway_image_refusals(pool, allowed),
        *service_refusals(pool, allowed),
    )


def messages(pool: Pool, allowed: Allowances | None, *, own_gateway: bool) -> tuple[str | None, str | None]:
    """What the conditions of a pool say: about its host, and about everything else.

    Args:
        pool: The pool.
        allowed: What its operator allows; None: everything.
        own_gateway: Whether the pool has gateways of its own. Another gateway reads no fields about gateways.

    Returns:
        For each condition a sentence, which is empty if all is allowed; None if there is nothing to check.
    """
    if allowed is None:
        return None, None
    if not own_gateway:
        return None, sentence(worker_refusals(pool, allowed))
    return sentence(host_refusals(pool, allowed)), sentence(refusals(pool, allowed))


def permitted(pool: Pool, allowed: Allowances) -> Pool:
    """The pool without what is not allowed of its gateway and its Service."""
    spec = pool.spec
    networking, gateway = spec.networking, spec.gateway
    external = networking.external
    refused = {one.field for one in service_refusals(pool, allowed)}
    if refused & {_GATEWAY_SERVICE, _NETWORKING_SERVICE}:
        gateway, networking = gateway.but(service_type=None), networking.but(service_type=None)
    if "spec.networking.annotations" in refused:
        networking = networking.but(annotations={})
    if "spec.networking.external.annotations" in refused:
        external = external.but(annotations={})
    if host_refusals(pool, allowed):
        external = external.but(hostname=None)
    image = None if gateway_image_refusals(pool, allowed) else spec.gateway_image
    networking = networking.but(external=external)
    return pool.but(spec=spec.but(networking=networking, gateway=gateway, gateway_image=image))


def _of_workers(pool: Pool, allowed: Allowances) -> Iterator[Disallowed]:
    namespace = pool.key.namespace
    if pool.metadata.annotations.get(ANNOTATION_ISOLATION) == PRIVILEGED and namespace not in allowed.privileged:
        why = f"{PRIVILEGED} workers are not allowed in namespace {namespace}"
        yield Disallowed(f"metadata.annotations[{ANNOTATION_ISOLATION}]", why, f"--allow-privileged {namespace}")
    if pool.spec.buildkit_image is not None:
        yield from _of_image("spec.buildkitImage", pool.spec.buildkit_image, namespace, allowed)


def _of_image(path: str, image: str, namespace: str, allowed: Allowances) -> Iterator[Disallowed]:
    if {image, f"{HUB}{image}"} & allowed.own_images:
        return
    patterns = [entry.value for entry in allowed.images if entry.namespace == namespace]
    if not any_matches(patterns, image):
        # The author chose the text, and an operator may copy the option into a shell.
        plain = _IMAGE_PATTERN.fullmatch(image) is not None and not set(image) & set("*?")
        why = f"the image {image[:_SHOWN]!r} is not allowed in namespace {namespace}"
        yield Disallowed(path, why, f"--allow-image {namespace}={image if plain else 'PATTERN'}")


def _of_service(pool: Pool, allowed: Allowances) -> Iterator[Disallowed]:
    namespace, networking = pool.key.namespace, pool.spec.networking
    if namespace not in allowed.load_balancers:
        of_gateway = pool.spec.gateway.service_type  # takes precedence
        path = _NETWORKING_SERVICE if of_gateway is None else _GATEWAY_SERVICE
        if (of_gateway or networking.service_type) is ServiceType.LOAD_BALANCER:
            why = f"LoadBalancer is not allowed in namespace {namespace}"
            yield Disallowed(path, why, f"--allow-load-balancer {namespace}")
    if namespace not in allowed.service_annotations:
        annotations = {
            "spec.networking.annotations": networking.annotations,
            "spec.networking.external.annotations": networking.external.annotations,
        }
        why = f"annotations of the Service are not allowed in namespace {namespace}"
        for path, value in annotations.items():
            if value:
                yield Disallowed(path, why, f"--allow-service-annotations {namespace}")


def sentence(found: Iterable[Disallowed]) -> str:
    """All refusals in one text; empty if there are none."""
    return "; ".join(one.message for one in found)


def _read(text: str, option: str, parse: Callable[[str], Allowed]) -> Allowed:
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidInput(f"{option}: {text[:80]!r} {error}", field=option) from None


def _pair(text: str, of: str) -> tuple[str, str]:
    namespace, equals, value = text.strip().partition("=")
    if not equals or not value:
        raise ValueError(f"is not of the form NAMESPACE={of}")
    try:
        return check_name(namespace, field="namespace"), value
    except InvalidInput:  # it names a field, and the caller names the option
        raise ValueError("does not begin with the name of a namespace") from None
