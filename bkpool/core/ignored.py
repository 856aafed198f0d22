"""Which fields of a pool's spec have no effect where it runs (DESIGN rule 12: nothing is silently dropped).

It looks at what the user wrote, never at defaults, and judges no value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from pydantic import BaseModel

from bkpool.core.auth import MethodType, OIDCConfigSpec
from bkpool.core.names import Key
from bkpool.core.pool import Egress, Pool, PoolSpec

_GATEWAY_OBJECTS = (
    "gatewayImage",
    "networking.serviceType",
    "networking.port",
    "networking.annotations",
    "networking.allowedCIDRs",
    "networking.external",
    "gateway.replicas",
    "gateway.resources",
    "gateway.serviceType",
    "gateway.port",
    "gateway.nodePort",
    "gateway.loadBalancerClass",
)
"""What only gateways that run as pods can heed."""

CLUSTER_IGNORES = frozenset({"auth.methods[].token.file"})
"""In a cluster, with a gateway Deployment a pool. Who may make a pool there may not name files of the appliance's."""
KIND_IGNORES = frozenset((*CLUSTER_IGNORES, *_GATEWAY_OBJECTS))
"""With pods as workers and the gateway on the host."""
PROCESS_IGNORES = frozenset(
    (*_GATEWAY_OBJECTS, "resources", "buildkitImage", "auth.methods[].token.secretRef", "networking.egress")
)
"""Without pods. A local cache is no such field: there every slot keeps its cache anyway."""

_FOREIGN_GATEWAY = "/buildkit-controller/gateway"
_INDEX = re.compile(r"\[\d+\]")


def ignored_fields(spec: PoolSpec, unread: Collection[str]) -> list[str]:
    """The dotted paths below `spec` of the fields that are set and have no effect, in order.

    Args:
        spec: Of the pool.
        unread: Paths below `spec` that the backend does not read, with all below them: one of the sets above.
    """
    found = {path for path, known in _set_fields(spec) if not known or _is_among(path, unread)}
    found |= {f"cache.backends[{n}]" for n, backend in enumerate(spec.cache.backends) if backend.type != "local"}
    found |= set(_of_methods(spec))
    if is_foreign_gateway(spec.gateway_image):
        found.add("gatewayImage")
    if spec.egress is not Egress.OPEN and _is_among("networking.egress", unread):
        found.add("networking.egress.policy")  # also where only `untrusted` asks for it
    return sorted(found)


def ignored_in_config(spec: OIDCConfigSpec) -> list[str]:
    """The same of an issuer; what is known of it works everywhere."""
    return sorted(path for path, known in _set_fields(spec) if not known)


def _of_methods(spec: PoolSpec) -> Iterator[str]:
    """What is said of another type than the method's own, and that a certificate is not required: it always is."""
    for number, method in enumerate(spec.auth.methods):
        path = f"auth.methods[{number}]"
        yield from (f"{path}.{other}" for other in MethodType if other is not method.type and getattr(method, other))
        if method.mtls is not None and not method.mtls.required:
            yield f"{path}.mtls.required"


def _is_among(path: str, stems: Collection[str]) -> bool:
    bare = _INDEX.sub("[]", path)
    return any(bare == stem or bare.startswith(f"{stem}.") for stem in stems)


class IgnoredFields:
    """The same, remembered of each pool until its spec changes: the controller asks at every look.

    Args:
        unread: As for `ignored_fields`.
    """

    def __init__(self, unread: Collection[str]) -> None:
        self._unread = unread
        self._known: dict[Key, tuple[PoolSpec, list[str]]] = {}

    def of(self, pool: Pool) -> list[str]:
        """The paths of the fields of this pool."""
        spec, found = self._known.get(pool.key, (None, []))
        if spec is not pool.spec:
            found = ignored_fields(pool.spec, self._unread)
            self._known[pool.key] = (pool.spec, found)
        return found


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
