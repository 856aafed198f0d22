"""The ValidatingAdmissionPolicy that refuses a pool that asks for more than the operator allows.

The controller applies the same rules (`bkpool.core.allowances`). This policy refuses such a pool already when it is
written, with the option that would allow it. It does not judge a pool whose spec and annotations stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.resources import files
from string import Template

from bkpool.core.allowances import HUB, Allowances, Allowed
from bkpool.workers.pods.pod_spec import PRIVILEGED_IMAGE, ROOTLESS_IMAGE


def allow_options(allowed: Allowances) -> Iterator[tuple[str, str]]:
    """The options of `manifests` and `up` that give these allowances, each with one value."""
    yield from (("--allow-host", str(one)) for one in sorted(allowed.hosts))
    yield from (("--allow-privileged", name) for name in sorted(allowed.privileged))
    yield from (("--allow-image", str(one)) for one in dict.fromkeys(allowed.images))
    yield from (("--allow-load-balancer", name) for name in sorted(allowed.load_balancers))
    yield from (("--allow-service-annotations", name) for name in sorted(allowed.service_annotations))


def render(allowed: Allowances, appliance: str, namespaces: Iterable[str], labels: str) -> str:
    """The policy and its binding, one YAML stream.

    Args:
        allowed: What pools may ask for.
        appliance: The namespace of the appliance.
        namespaces: Those that may have pools.
        labels: The labels of both objects, in YAML.
    """
    text = (files("bkpool.install") / "templates" / "pool-policy.yaml").read_text("utf-8")
    return Template(text).substitute(
        appliance=appliance,
        labels=labels,
        namespaces=f"[{', '.join(namespaces)}]",
        hosts=_list(str(one) for one in sorted(allowed.hosts)),
        privileged=_list(sorted(allowed.privileged)),
        own_images=_list(_own_images(allowed)),
        images=_map(allowed.images),
        load_balancers=_list(sorted(allowed.load_balancers)),
        service_annotations=_list(sorted(allowed.service_annotations)),
    )


def _own_images(allowed: Allowances) -> list[str]:
    """The images of bkpool, also as people write them who leave the registry out."""
    own = allowed.own_images | {ROOTLESS_IMAGE, PRIVILEGED_IMAGE}
    return sorted(own | {image.removeprefix(HUB) for image in own})


def _list(values: Iterable[str]) -> str:
    """A list in CEL. No value has a quote or a backslash in it."""
    return f"[{', '.join(repr(value) for value in values)}]"


def _map(images: Iterable[Allowed]) -> str:
    """A map in CEL, from a namespace to the regular expression of the images that it may name."""
    found: dict[str, list[str]] = {}
    for namespace, pattern in images:
        found.setdefault(namespace, []).append(_expression(pattern))
    entries = [f"{namespace!r}: '^({'|'.join(parts)})$'" for namespace, parts in found.items()]
    return "{" + ", ".join(entries) + "}"


def _expression(pattern: str) -> str:
    return pattern.replace(".", "[.]").replace("*", ".*").replace("?", ".")
