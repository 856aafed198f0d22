"""The custom resource definitions: the YAML files beside this module, and their installation in a cluster.

The files are the only source: `bkpool manifests` prints them unchanged. Nothing is generated. Several installations
share the definitions, so an older one never takes a field away that a newer one has added.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from importlib.resources import files
from typing import cast

from bkpool.core import yaml_text
from bkpool.core.errors import NotFound, Unavailable
from bkpool.kube.client import KubeApi
from bkpool.kube.documents import Doc
from bkpool.kube.paths import group

_FILES = ("buildkitpools.yaml", "buildkitworkers.yaml", "buildkitgateways.yaml", "buildkitoidcconfigs.yaml")
_API, _PLURAL = "apiextensions.k8s.io/v1", "customresourcedefinitions"
_COMPARED_APART = {"properties", "required", "enum", "description"}
"""The parts of a schema that may differ: none of them counts just because it is different."""
_TIMEOUT = 30.0
"""Seconds until a definition must be served. The API server takes well under one."""


def texts() -> tuple[str, ...]:
    """The text of the definitions with their comments, one YAML document each."""
    directory = files("bkpool.install") / "crds"
    return tuple((directory / name).read_text("utf-8") for name in _FILES)


def definitions() -> tuple[Doc, ...]:
    """The parsed definitions."""
    return tuple(cast("Doc", yaml_text.load(text)) for text in texts())


async def install(api: KubeApi) -> None:
    """Applies the definitions and returns when the API server serves them. Fields that others have set stay.

    A definition that has everything already is left alone.

    Raises:
        Forbidden: The user of the kubeconfig lacks a right.
        Unavailable: The API server does not answer, or does not serve them within 30 s.
    """
    for definition in definitions():
        name = definition["metadata"]["name"]
        found = await _live(api, name)
        if found is None or not covers(found["spec"], definition["spec"]):
            found = await api.apply(group(_API, _PLURAL, name=name), definition)
        try:
            async with asyncio.timeout(_TIMEOUT):
                await _wait_until_served(api, name, found)
        except TimeoutError:
            raise Unavailable(
                f"Kubernetes: {name} was applied but is not served",
                hint=f"Look at its conditions: kubectl get crd {name} -o yaml",
            ) from None


def covers(live: object, wanted: object) -> bool:
    """Whether a definition accepts and keeps everything that is wanted. It may have more, and other descriptions."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        return all(
            name in live and (_schema_covers if name == "openAPIV3Schema" else covers)(live[name], value)
            for name, value in wanted.items()
        )
    if isinstance(wanted, list) and isinstance(live, list):
        return all(any(covers(one, value) for one in live) for value in wanted)
    return live == wanted


def _schema_covers(live: object, wanted: object) -> bool:
    """Whether a schema has every field that is wanted and is not stricter. It may have more fields and values."""
    if not isinstance(wanted, dict) or not isinstance(live, dict):
        return live == wanted
    fields, wanted_fields = live.get("properties", {}), wanted.get("properties", {})
    others = (live.keys() | wanted.keys()) - _COMPARED_APART
    return (
        all(name in fields and _schema_covers(fields[name], value) for name, value in wanted_fields.items())
        and set(live.get("required", ())) <= set(wanted.get("required", ()))
        and ("enum" in live) == ("enum" in wanted)
        and set(wanted.get("enum", ())) <= set(live.get("enum", ()))
        and all(_schema_covers(live.get(name), wanted.get(name)) for name in others)
    )


async def _live(api: KubeApi, name: str) -> Doc | None:
    try:
        return await api.get(group(_API, _PLURAL, name=name))
    except NotFound:
        return None


async def _wait_until_served(api: KubeApi, name: str, seen: Doc) -> None:
    while not _established(seen):
        since = seen["metadata"]["resourceVersion"]
        watch = api.watch(group(_API, _PLURAL), since, fieldSelector=f"metadata.name={name}")
        async with aclosing(watch) as events:
            async for event in events:
                seen = event["object"]
                if event["type"] != "BOOKMARK" and _established(seen):
                    break


def _established(definition: Doc) -> bool:
    conditions = (definition.get("status") or {}).get(
        "conditions"
    ) or ()  # null in a definition that was just created
    return any(found["type"] == "Established" and found["status"] == "True" for found in conditions)
