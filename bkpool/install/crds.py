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
    """Whether a definition has everything that is wanted. It may have more, and other descriptions."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        return all(_covers_entry(live, name, value) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(live, list):
        return all(any(covers(one, value) for one in live) for value in wanted)
    return live == wanted


def _covers_entry(live: Doc, name: str, value: object) -> bool:
    is_text = name == "description" and isinstance(value, str)
    return is_text or (name in live and covers(live[name], value))


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
