"""The patches of the Kubernetes API, and who wrote which field, as far as the fake API server needs them.

Pure. Apply on the server's side replaces every list as a whole, and knows no conflicts between managers.
"""

from __future__ import annotations

import copy
from typing import Any

from support.fake_kinds import Doc, bad_request, invalid

_LISTS_OF_KEYS = {"finalizers", "ownerReferences"}


def merge_patched(doc: Any, patch: Any) -> Any:
    """A merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(doc) if isinstance(doc, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patched(result.get(name), value)
    return result


def json_patched(doc: Doc, operations: list[Doc]) -> Doc:
    """A JSON patch (RFC 6902) with add, replace, remove and test."""
    result = copy.deepcopy(doc)
    for operation in operations:
        *parents, last = [
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].removeprefix("/").split("/")
        ]
        at: Any = result
        for part in parents:
            at = _child(at, part)
        _do(operation, at, last)
    return result


def _child(at: Any, part: str) -> Any:
    try:
        return at[int(part)] if isinstance(at, list) else at[part]
    except (KeyError, IndexError, ValueError, TypeError):
        raise invalid(f"the patch names a part that does not exist: {part}", part) from None


def _do(operation: Doc, at: Any, last: str) -> None:
    match operation["op"]:
        case "test":
            if _child(at, last) != operation["value"]:
                raise invalid(f"testing value {operation['path']} failed", operation["path"])
        case "remove":
            _child(at, last)
            del at[int(last) if isinstance(at, list) else last]
        case "add" if isinstance(at, list):
            at.insert(len(at) if last == "-" else int(last), operation["value"])
        case "add":
            at[last] = operation["value"]
        case "replace":
            _child(at, last)
            at[int(last) if isinstance(at, list) else last] = operation["value"]
        case other:
            raise bad_request(f"the server does not know the operation {other}")


def applied(doc: Doc, before: Doc, wanted: Doc) -> Doc:
    """Apply: fields of `wanted` get these values, and those that this manager applied `before` only go away."""
    result = dict(doc)
    for name, value in before.items():
        if name not in wanted:
            if not isinstance(value, dict) or not isinstance(result.get(name), dict):
                result.pop(name, None)
            elif left := applied(result[name], value, {}):
                result[name] = left
            else:
                result.pop(name)
    for name, value in wanted.items():
        old = result.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            earlier = before.get(name)
            result[name] = applied(old, earlier if isinstance(earlier, dict) else {}, value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def managed_fields(doc: Doc, before: list[Doc], manager: str, operation: str, sub: str, at: str) -> list[Doc]:
    """Who wrote which field, as a real server adds it: one entry for the object and one for its status.

    It is not right in detail: the last writer of a part has written all of it. But it is as long as a real one, which
    matters where bytes are counted.
    """
    part = {"status": doc.get("status", {})} if sub else {k: v for k, v in doc.items() if k != "status"}
    fields = {name: value for name, value in part.items() if name not in {"apiVersion", "kind", "metadata"}}
    written = {f"f:{name}": _fields(value) for name, value in fields.items()}
    if not sub:
        named = {k: v for k, v in doc["metadata"].items() if k in {"labels", "annotations", *_LISTS_OF_KEYS} and v}
        written["f:metadata"] = {f"f:{name}": _metadata_fields(name, value) for name, value in named.items()}
    entry = {
        "manager": manager,
        "operation": operation,
        "apiVersion": doc["apiVersion"],
        "time": at,
        "fieldsType": "FieldsV1",
        "fieldsV1": written,
        **({"subresource": sub} if sub else {}),
    }
    return [*(one for one in before if one.get("subresource", "") != sub), entry]


def _fields(value: Any) -> Doc:
    if not isinstance(value, dict):
        return {}
    return {".": {}, **{f"f:{name}": _fields(inner) for name, inner in value.items()}}


def _metadata_fields(name: str, value: Any) -> Doc:
    if name not in _LISTS_OF_KEYS:
        return _fields(value)
    keys = [f'v:"{one}"' if isinstance(one, str) else f'k:{{"uid":"{one.get("uid")}"}}' for one in value]
    return {".": {}, **{key: {} for key in keys}}
