"""Which fields of a pool's spec have no effect where it runs (DESIGN rule 12: nothing is silently dropped).

It looks at what the user wrote, never at defaults, and judges no value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import BaseModel

from bkpool.core.objects import PoolSpec

_GATEWAY_OBJECTS = (
    "gatewayImage",
    "networking",
    "gateway.replicas",
    "gateway.resources",
    "gateway.serviceType",
    "gateway.port",
    "gateway.nodePort",
    "gateway.loadBalancerClass",
)
"""What only gateways that run as pods can heed."""

CLUSTER_IGNORES: frozenset[str] = frozenset()
"""In a cluster, with a gateway Deployment a pool."""
KIND_IGNORES = frozenset(_GATEWAY_OBJECTS)
"""With pods as workers and the gateway on the host."""
PROCESS_IGNORES = frozenset((*_GATEWAY_OBJECTS, "resources", "buildkitImage"))
"""Without pods. A local cache is no such field: there every slot keeps its cache anyway."""

_FOREIGN_GATEWAY = "/buildkit-controller/gateway"


def ignored_fields(spec: PoolSpec, unread: Collection[str]) -> list[str]:
    """The dotted paths below `spec` of the fields that are set and have no effect, in order.

    Args:
        spec: Of the pool.
        unread: Paths below `spec` that the backend does not read, with all below them: one of the sets above.
    """
    found = {
        path
        for path, known in _set_fields(spec)
        if not known or any(path == stem or path.startswith(f"{stem}.") for stem in unread)
    }
    found |= {f"cache.backends[{n}]" for n, backend in enumerate(spec.cache.backends) if backend.type != "local"}
    if is_foreign_gateway(spec.gateway_image):
        found.add("gatewayImage")
    return sorted(found)


def is_foreign_gateway(image: str | None) -> bool:
    """Whether this is the older Go controller's gateway, which its users have written out; it cannot run here."""
    return image is not None and _FOREIGN_GATEWAY in image


def _set_fields(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every field that is set to something, down to its leaves, and whether the model knows it."""
    for name in model.model_extra or {}:
        yield f"{prefix}{name}", False
    for name, info in type(model).model_fields.items():
        path, value = f"{prefix}{info.alias or name}", getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _set_fields(value, f"{path}.")
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                yield from _set_fields(item, f"{path}[{number}].")
        elif name in model.model_fields_set and value not in (None, (), {}):
            yield path, True
