"""The custom resource definitions: the YAML files beside this module, and how a cluster gets them.

The files are the one source: `bkpool manifests` prints them as they are. Nothing is generated.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from importlib.resources import files

import yaml

from bkpool.core.errors import Unavailable
from bkpool.kube.client import Doc, KubeApi
from bkpool.kube.paths import group

_FILES = ("buildkitpools.yaml", "buildkitworkers.yaml", "buildkitoidcconfigs.yaml")
_API, _PLURAL = "apiextensions.k8s.io/v1", "customresourcedefinitions"
_PATIENCE = 30.0
"""Seconds until a definition must be served; it takes the API server well under one."""


def texts() -> tuple[str, ...]:
    """The definitions as they are written, one YAML document each, with their comments."""
    directory = files("bkpool.install") / "crds"
    return tuple((directory / name).read_text("utf-8") for name in _FILES)


def definitions() -> tuple[Doc, ...]:
    """The definitions as documents."""
    return tuple(yaml.safe_load(text) for text in texts())


async def install(api: KubeApi) -> None:
    """Applies the definitions and returns when the API server serves them. Fields that others have set stay.

    Raises:
        Forbidden: A right is missing.
        Unavailable: The API server is away, or does not come to serve them.
    """
    for definition in definitions():
        name = definition["metadata"]["name"]
        applied = await api.apply(group(_API, _PLURAL, name=name), definition)
        try:
            async with asyncio.timeout(_PATIENCE):
                await _served(api, name, applied)
        except TimeoutError:
            raise Unavailable(
                f"Kubernetes: {name} was applied but is not served",
                hint=f"Look at its conditions: kubectl get crd {name} -o yaml",
            ) from None


async def _served(api: KubeApi, name: str, seen: Doc) -> None:
    while not _established(seen):
        since = seen["metadata"]["resourceVersion"]
        watch = api.watch(group(_API, _PLURAL), since, fieldSelector=f"metadata.name={name}")
        async with aclosing(watch) as events:
            async for event in events:
                seen = event["object"]
                if event["type"] != "BOOKMARK" and _established(seen):
                    break


def _established(definition: Doc) -> bool:
    conditions = (definition.get("status") or {}).get("conditions") or ()  # null in what has just been made
    return any(found["type"] == "Established" and found["status"] == "True" for found in conditions)
