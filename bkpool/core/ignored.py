"""Which fields of a spec are set and have no effect.

They are shown to the user, so that nothing is ignored silently (rule 12, docs/rules.md#r12). This module reads what
the user wrote and never at defaults. It does not judge values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from pydantic import BaseModel

from bkpool.core.auth import MethodType, OIDCConfigSpec
from bkpool.core.names import Key
from bkpool.core.pool import Egress, Pool, PoolSpec
from bkpool.core.unknown_fields import with_questions

_FOREIGN_GATEWAY = "/buildkit-controller/gateway"
OTHER_RESOURCES = "resources.buildkit other than cpu, memory and pids"
"""In `ignored_here`: these names of requests and limits have no effect."""

_KNOWN_RESOURCES = {"requests": {"cpu", "memory"}, "limits": {"cpu", "memory", "pids"}}
_INDEX = re.compile(r"\[\d+\]")


def ignored_fields(spec: PoolSpec, ignored_here: Collection[str]) -> list[str]:
    """The dotted paths below `spec` of the fields that are set and have no effect, sorted.

    Args:
        spec: The pool's.
        ignored_here: Paths below `spec` that nothing reads where the pool runs, each with everything below it
            (`Runtime.ignored_spec_fields`).
    """
    found = {path for path, known in _set_fields(spec) if not known or _is_below(path, ignored_here)}
    found |= {f"cache.backends[{n}]" for n, backend in enumerate(spec.cache.backends) if backend.type != "local"}
    found |= set(_of_methods(spec))
    if OTHER_RESOURCES in ignored_here:
        found |= set(_other_resources(spec))
    if is_foreign_gateway(spec.gateway_image):
        found.add("gatewayImage")
    if spec.egress is not Egress.OPEN and _is_below("networking.egress", ignored_here):
        found.add("networking.egress.policy")  # also if only `untrusted` asks for it
    return sorted(found)


def ignored_in_config(spec: OIDCConfigSpec) -> list[str]:
    """The same for an issuer, with the name that a misspelt field probably means.

    Every known field of an issuer has an effect everywhere.
    """
    return with_questions(sorted(path for path, known in _set_fields(spec) if not known), spec)


def _of_methods(spec: PoolSpec) -> Iterator[str]:
    """Fields of another type of method, and `mtls.required: false`, because a certificate is always required."""
    for number, method in enumerate(spec.auth.methods):
        path = f"auth.methods[{number}]"
        yield from (f"{path}.{other}" for other in MethodType if other is not method.type and getattr(method, other))
        if method.mtls is not None and not method.mtls.required:
            yield f"{path}.mtls.required"


def _other_resources(spec: PoolSpec) -> Iterator[str]:
    given = spec.resources.buildkit
    for kind, amounts in (("requests", given.requests), ("limits", given.limits)):
        yield from (f"resources.buildkit.{kind}.{name}" for name in amounts if name not in _KNOWN_RESOURCES[kind])


def _is_below(path: str, stems: Collection[str]) -> bool:
    without_numbers = _INDEX.sub("[]", path)
    return any(without_numbers == stem or without_numbers.startswith(f"{stem}.") for stem in stems)


class IgnoredFields:
    """Remembers the result for each pool until its spec changes. The controller asks in every round.

    Args:
        ignored_here: As for `ignored_fields`.
        ignored_in_file: The paths below `spec` of what has no effect in `spec.buildkitConfig`.
    """

    def __init__(
        self, ignored_here: Collection[str], ignored_in_file: Callable[[PoolSpec], Iterable[str]] = lambda _spec: ()
    ) -> None:
        self._ignored_here = ignored_here
        self._ignored_in_file = ignored_in_file
        self._known: dict[Key, tuple[Pool, list[str]]] = {}

    def of(self, pool: Pool) -> list[str]:
        """The paths of the ignored fields of this pool, with the name that a misspelt one probably means."""
        known, found = self._known.get(pool.key, (None, []))
        if known is None or not _has_same_spec(known, pool):
            paths = sorted({*ignored_fields(pool.spec, self._ignored_here), *self._ignored_in_file(pool.spec)})
            found = with_questions(paths, pool.spec)
            self._known[pool.key] = (pool, found)
        return found


def _has_same_spec(one: Pool, other: Pool) -> bool:
    """Whether the spec is the same, although each change of the status makes a new object of it."""
    return one.spec is other.spec or (
        other.metadata.generation is not None and one.spec_version == other.spec_version
    )


def is_foreign_gateway(image: str | None) -> bool:
    """Whether this is the gateway image of the older Go controller, which cannot run here.

    Users of that controller have it in their pools, because it was written out in its examples.
    """
    return image is not None and _FOREIGN_GATEWAY in image


def _set_fields(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The path of every field that is set, down to the innermost ones, and whether the model knows it."""
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
