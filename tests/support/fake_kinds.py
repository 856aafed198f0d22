"""What the fake API server knows of kinds: their paths, which parts of an object have a life of their own, selectors.

Pure. bkpool's own kinds are read from the definitions that it installs, so a new one is served without a change here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from bkpool.install import crds

Doc = dict[str, Any]
Matches = Callable[[Doc], bool]


class Refused(Exception):
    """What an API server answers with a Status object.

    Args:
        code: The HTTP status.
        reason: A word, such as "Conflict".
        message: A sentence.
        field: The field that the server rejects.
    """

    def __init__(self, code: int, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.status: Doc = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
        if field:
            self.status["details"] = {"causes": [{"reason": "FieldValueInvalid", "message": message, "field": field}]}


def bad_request(message: str) -> Refused:
    return Refused(400, "BadRequest", message)


def invalid(message: str, field: str) -> Refused:
    return Refused(422, "Invalid", message, field)


@dataclass(frozen=True, slots=True)
class ServedKind:
    """One kind of object that the server keeps."""

    api_version: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False
    """Whether the status has its own path, so that all other writes leave it alone."""
    counts_generations: bool = False
    custom: bool = False
    fields: frozenset[str] = frozenset()
    """What a field selector may name, apart from the name and the namespace."""


_V1, _APPS, _NETWORK = "v1", "apps/v1", "networking.k8s.io/v1"
_BUILT_IN = (
    ServedKind(_V1, "namespaces", "Namespace", namespaced=False),
    ServedKind(_V1, "nodes", "Node", namespaced=False),
    ServedKind(
        _V1, "pods", "Pod", has_status=True, fields=frozenset({"spec.nodeName", "status.phase", "status.podIP"})
    ),
    ServedKind(_V1, "persistentvolumeclaims", "PersistentVolumeClaim", has_status=True),
    ServedKind(_V1, "secrets", "Secret", fields=frozenset({"type"})),
    ServedKind(_V1, "configmaps", "ConfigMap"),
    ServedKind(_V1, "services", "Service", has_status=True),
    ServedKind(_V1, "serviceaccounts", "ServiceAccount"),
    ServedKind(_V1, "events", "Event", fields=frozenset({"involvedObject.name", "involvedObject.uid", "reason"})),
    ServedKind(
        "events.k8s.io/v1", "events", "Event", fields=frozenset({"regarding.name", "regarding.uid", "reason"})
    ),
    ServedKind("coordination.k8s.io/v1", "leases", "Lease"),
    ServedKind(_APPS, "deployments", "Deployment", has_status=True, counts_generations=True),
    ServedKind(_NETWORK, "networkpolicies", "NetworkPolicy", counts_generations=True),
    ServedKind("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", has_status=True, counts_generations=True),
    ServedKind("rbac.authorization.k8s.io/v1", "roles", "Role"),
    ServedKind("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding"),
    ServedKind("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False),
)


def _custom(definition: Doc) -> ServedKind:
    spec, version = definition["spec"], definition["spec"]["versions"][0]
    return ServedKind(
        f"{spec['group']}/{version['name']}",
        spec["names"]["plural"],
        spec["names"]["kind"],
        namespaced=spec["scope"] == "Namespaced",
        has_status="status" in version.get("subresources", {}),
        counts_generations=True,
        custom=True,
        fields=frozenset(one["jsonPath"].removeprefix(".") for one in version.get("selectableFields", ())),
    )


def served_kinds() -> dict[tuple[str, str], ServedKind]:
    """Every kind, by API version and plural."""
    return {(kind.api_version, kind.plural): kind for kind in (*_BUILT_IN, *_custom_kinds())}


@cache
def _custom_kinds() -> tuple[ServedKind, ...]:
    """Reads the definitions once. To parse them takes longer than a test, and each has an API server of its own."""
    return tuple(_custom(definition) for definition in crds.definitions())


@dataclass(frozen=True, slots=True)
class Where:
    """What the path of a request names."""

    api_version: str
    plural: str
    namespace: str = ""
    """Empty: all of them, or a kind that has none."""
    name: str = ""
    sub: str = ""

    @property
    def resource(self) -> str:
        """Such as "pods" or "buildkitworkers/status", as rights name it."""
        return f"{self.plural}/{self.sub}" if self.sub else self.plural


def where(path: str) -> Where:
    """Reads a path of the API. Raises Refused."""
    parts = path.strip("/").split("/")
    match parts:
        case ["api", "v1", *rest]:
            version = "v1"
        case ["apis", group, number, *rest]:
            version = f"{group}/{number}"
        case _:
            rest, version = [], ""
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    if not 1 <= len(rest) <= 3:
        raise Refused(404, "NotFound", f"the server could not find the requested resource: {path}")
    return Where(version, rest[0], namespace, *rest[1:])


# --- selectors ------------------------------------------------------------------------------------------------------

_SET = re.compile(r"^(?P<key>\S+)\s+(?P<operator>in|notin)\s+\((?P<values>[^)]*)\)$")
_EQUAL = re.compile(r"^(?P<key>[^=!]+?)\s*(?P<operator>==|=|!=)\s*(?P<value>.*)$")
_COMMA = re.compile(r",(?![^(]*\))")


def label_selector(text: str) -> Matches | None:
    """Whether an object has the labels; None: every object has. Raises Refused."""
    terms = [_label_term(term.strip()) for term in _COMMA.split(text) if term.strip()]
    return (lambda doc: _all_match(terms, doc["metadata"].get("labels") or {})) if terms else None


def _all_match(terms: list[Callable[[Mapping[str, str]], bool]], labels: Mapping[str, str]) -> bool:
    return all(term(labels) for term in terms)


def _label_term(term: str) -> Callable[[Mapping[str, str]], bool]:
    if found := _SET.match(term):
        key, values = found["key"], {value.strip() for value in found["values"].split(",")}
        if found["operator"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if found := _EQUAL.match(term):
        key, value = found["key"], found["value"]
        if found["operator"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    key = term.removeprefix("!").strip()
    if not key or re.search(r"[\s()=]", key):
        raise bad_request(f"unable to parse requirement: {term}")
    if term.startswith("!"):
        return lambda labels: key not in labels
    return lambda labels: key in labels


def field_selector(kind: ServedKind, text: str) -> Matches | None:
    """The same for fields. Raises Refused for a field that the server has no index of."""
    terms: list[tuple[str, bool, str]] = []
    for term in filter(None, text.split(",")):
        found = _EQUAL.match(term)
        if found is None:
            raise bad_request(f"invalid field selector: {term}")
        if found["key"] not in kind.fields | {"metadata.name", "metadata.namespace"}:
            raise bad_request(f"field label not supported: {found['key']} (of {kind.plural})")
        terms.append((found["key"], found["operator"] != "!=", found["value"]))
    if not terms:
        return None
    return lambda doc: all((_field(doc, path) == value) is equal for path, equal, value in terms)


def _field(doc: Doc, path: str) -> str:
    value: Any = doc
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def both(first: Matches | None, second: Matches | None) -> Matches | None:
    if first is None or second is None:
        return first or second
    return lambda doc: first(doc) and second(doc)
