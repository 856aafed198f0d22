"""Where things are in the Kubernetes API: pure string work, so that no path is spelt in two places."""

from __future__ import annotations

from typing import Any

from bkpool.core.names import API_VERSION, Key


def core(plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
    """Where a thing of the core group is: plural "pods", namespace, name, and sub-resource such as "log"."""
    return _path("/api/v1", plural, namespace, name, sub)


def group(
    api_version: str, plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None
) -> str:
    """Where a thing of another group is, such as "apps/v1" and "deployments"."""
    return _path(f"/apis/{api_version}", plural, namespace, name, sub)


def custom(plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
    """Where one of bkpool's own objects is."""
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
