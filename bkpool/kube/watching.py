"""A watch without end, made of the watches that an API server ends every few minutes.

It keeps no objects and never lists: where a watch cannot go on, that is an error, and the caller lists again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from bkpool.core.errors import Unavailable
from bkpool.kube.client import KubeApi
from bkpool.kube.documents import Doc

SHORTEST_WATCH = 1.0
"""Seconds. A watch that ends sooner and brings nothing new is a fault, as in client-go's reflector."""


async def endless_watch(
    api: KubeApi, path: str, since: str, *, jitter: Callable[[], float] = random.random, **params: str
) -> AsyncGenerator[Doc, None]:
    """Every event after `since`, bookmarks included. Close it (contextlib.aclosing) when done.

    Args:
        api: The cluster.
        path: The collection.
        since: The resourceVersion of the last change that is known.
        jitter: Returns a number from 0 to 1.
        params: Selectors, as query parameters.

    Raises:
        Gone: `since` is too long ago: list again.
        Unavailable: The server is away, the watch is frozen, or the server ends it at once.
    """
    clock = asyncio.get_running_loop().time
    while True:
        begun, before = clock(), since
        seconds = round(api.limits.watch_duration * (1 + jitter() / 4))
        async with aclosing(api.watch(path, since, timeoutSeconds=str(seconds), **params)) as events:
            async for event in events:
                since = event["object"]["metadata"]["resourceVersion"]
                yield event
        if since == before and clock() - begun < SHORTEST_WATCH:
            raise Unavailable(
                f"Kubernetes: watch {path}: the server ends it at once",
                hint="bkpool lists again and starts a new watch.",
            )
