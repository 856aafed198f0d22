"""The paths of objects in the Kubernetes API, built in this one place. Pure string work."""

from __future__ import annotations

from typing import Any

from bkpool.core.names import API_VERSION, Key


def core(plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
    """The path of an object of the core group: plural ("pods"), namespace, name, and sub-resource ("log")."""
    return _path("/api/v1", plural, namespace, name, sub)


def group(
    api_version: str, plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None
) -> str:
    """The path of an object of another group, such as "apps/v1" and "deployments"."""
    return _path(f"/apis/{api_version}", plural, namespace, name, sub)


def custom(plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
    """The path of one of bkpool's own objects."""
    return group(API_VERSION, plural, namespace, name, sub)


def key_of(doc: dict[str, Any]) -> Key:
    """The namespace and name of an object."""
    return Key(doc["metadata"]["namespace"], doc["metadata"]["name"])


def _path(base: str, plural: str, namespace: str | None, name: str | None, sub: str | None) -> str:
    parts = [base]
    if namespace is not None:
        parts += ["namespaces", namespace]
    parts.append(plural)
    parts += [part for part in (name, sub) if part is not None]
    return "/".join(parts)
