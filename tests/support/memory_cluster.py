"""An API server as far as `PodWrites` needs one: a dictionary. Nobody can watch it."""

from __future__ import annotations

import copy
from typing import Any

from bkpool.core.errors import NotFound


class MemoryCluster:
    """What `PodWrites` needs of an API server."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.versions = 0

    async def create(self, where: object, doc: Any) -> Any:
        return await self.apply(f"{where}/{doc['metadata']['name']}", doc)

    async def apply(self, path: object, doc: Any) -> Any:
        self.versions += 1
        made = copy.deepcopy(doc)
        made["metadata"] |= {"uid": f"uid-of-{path}", "resourceVersion": str(self.versions)}
        self.objects[str(path)] = made
        return copy.deepcopy(made)

    async def patch(self, path: object, change: Any) -> Any:
        doc = self.objects[str(path)]
        self.versions += 1
        doc["metadata"]["resourceVersion"] = str(self.versions)
        for name, value in change["metadata"].get("annotations", {}).items():
            doc["metadata"]["annotations"].pop(name, None)
            if value is not None:
                doc["metadata"]["annotations"][name] = value
        return copy.deepcopy(doc)

    async def get(self, path: object) -> Any:
        raise NotFound(str(path))
