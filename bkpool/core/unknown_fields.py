"""Finds the fields of an object that bkpool does not know, and the names that their author probably meant.

A file of `up -f` with such a field is refused; a stored object keeps it, and the field is named (rule 12,
docs/rules.md#r12). This module looks at names only: it never judges a value, and reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.pool import Pool, PoolSpec

Path = tuple[str | int, ...]
"""Names of fields and positions in lists, from the outside in."""

NOT_READ_YET: dict[type[BaseModel], frozenset[str]] = {
    PoolSpec: frozenset(
        {
            "cache.backends[].registry",
            "cache.backends[].s3",
            "cache.gc.schedule",
            "gateway.enabled",
            "gateway.gatewayAPI",
            "gateway.ingress",
            "observability",
            "resources.sidecar",
            "scaling.mode",
            "scaling.scaleDownSchedule",
            "scaling.targetActiveConnections",
            "scaling.targetCPUUtilization",
            "scaling.targetMemoryUtilization",
            "tls",
        }
    ),
    OIDCConfigSpec: frozenset({"clientSecretRef"}),
}
"""Fields of the contract that have no effect yet, as paths below `spec`. What is below them is not looked at."""

_OF_KUBERNETES = frozenset(
    {"generateName", "managedFields", "selfLink", "deletionGracePeriodSeconds", "blockOwnerDeletion"}
)
"""Metadata that the Kubernetes API has and bkpool does not use: `kubectl get -o yaml` writes it."""
_INDEX = re.compile(r"\[\d+\]")


@dataclass(frozen=True, slots=True)
class UnknownField:
    """A field that bkpool does not know."""

    path: Path
    meant: str | None
    """The name that its author probably meant, perhaps with the field that it belongs below; None: no guess."""

    @property
    def dotted(self) -> str:
        """The path as a person reads it: `cache.backends[0].local.iops`."""
        return dotted(self.path)

    @property
    def question(self) -> str:
        """`did you mean …?`; empty without a guess."""
        return f"did you mean `{self.meant}`?" if self.meant else ""


def unknown_fields(obj: Pool | OIDCConfig) -> Iterator[UnknownField]:
    """The unknown fields of a whole object. Its status is left out: only bkpool writes that."""
    for name in obj.model_extra or {}:
        yield UnknownField((name,), _close(name, _names(type(obj))))
    yield from _below(obj.metadata, ("metadata",), _OF_KUBERNETES)
    for unknown in unknown_in_spec(obj.spec):
        yield UnknownField(("spec", *unknown.path), unknown.meant)


def unknown_in_spec(spec: PoolSpec | OIDCConfigSpec) -> Iterator[UnknownField]:
    """The unknown fields of a spec, with their paths below it."""
    yield from _below(spec, (), NOT_READ_YET[type(spec)], type(spec))


def with_questions(paths: Collection[str], spec: PoolSpec | OIDCConfigSpec) -> list[str]:
    """The dotted paths of ignored fields, each with `did you mean …?` where there is a guess."""
    questions = {unknown.dotted: unknown.question for unknown in unknown_in_spec(spec) if unknown.question}
    return [f"{path} ({questions[path]})" if path in questions else path for path in paths]


def dotted(path: Path) -> str:
    """The path as a person reads it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _below(
    model: BaseModel, path: Path, allowed: Collection[str], root: type[BaseModel] | None = None
) -> Iterator[UnknownField]:
    """The unknown fields of a part of an object.

    Args:
        model: The part.
        path: Where it is.
        allowed: Names that are known although the models do not have them: as paths below the root, or, for
            metadata, as names.
        root: The class of the spec that the part is in; None for metadata.
    """
    stem = _INDEX.sub("[]", dotted(path)) if root else ""
    here = {name.rpartition(".")[2] for name in allowed if name.rpartition(".")[0] == stem}
    for name in model.model_extra or {}:
        if name not in here:
            meant = _close(name, _names(type(model)) | here) or (_elsewhere(name, root) if root else None)
            yield UnknownField((*path, name), meant)
    for field, info in type(model).model_fields.items():
        value, inner = getattr(model, field), (*path, info.alias or field)
        if isinstance(value, BaseModel):
            yield from _below(value, inner, allowed, root)
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _below(item, (*inner, number), allowed, root)


def _close(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like this one; None if none is."""
    by_lower = {one.lower(): one for one in known}
    found = get_close_matches(name.lower().replace("_", ""), by_lower, n=1)
    return by_lower[found[0]] if found else None


def _elsewhere(name: str, root: type[BaseModel]) -> str | None:
    """The path of the only field that has exactly this name in another part of the spec; None if none or several."""
    found = [path for path in _all_paths(root) if path.rpartition(".")[2].lower() == name.lower()]
    return found[0] if len(found) == 1 else None


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(info.alias or name for name, info in model.model_fields.items())


@cache
def _all_paths(model: type[BaseModel]) -> tuple[str, ...]:
    """The paths of all fields below a model, without those in lists, whose parent's place nobody can guess."""
    return tuple(_paths(model, ""))


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        yield path
        for inner in _models_in(info.annotation):
            yield from _paths(inner, f"{path}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif type(None) in get_args(annotation):  # an optional field
        for inner in get_args(annotation):
            yield from _models_in(inner)
