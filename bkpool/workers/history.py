"""Clears the build history of a worker, which has build arguments, commands and logs of the builds of its callers.

It says by an error that something may be left; what happens to the worker then is decided by those who call it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import aclosing

from bkpool.buildkit import BuildEventType, ControlClient
from bkpool.core.errors import BkpoolError, Unavailable, WorkerFailed

CLEAR_TIMEOUT = 30.0
"""Seconds for all of it. A build whose client is gone ends within a second."""


async def clear(client: ControlClient) -> None:
    """Deletes every build from the history, and waits for builds that still run.

    Nobody may start a build meanwhile.

    Raises:
        Unavailable: The daemon does not answer, or a build did not end within `CLEAR_TIMEOUT`.
        WorkerFailed: The daemon answers with an error.
    """
    try:
        async with asyncio.timeout(CLEAR_TIMEOUT):
            while True:
                running, ended = await _builds(client)
                for ref in ended:
                    await client.delete_build(ref)
                if running:
                    await _until_ended(client, running)
                elif not ended:
                    return
    except TimeoutError:
        raise Unavailable(f"the build history was not empty after {CLEAR_TIMEOUT:g} s") from None


def not_cleared(error: BkpoolError) -> WorkerFailed:
    """The error for a worker whose cache was wiped, because its history could not be cleared."""
    return WorkerFailed(
        f"the build history of callers before could not be cleared, so the cache was wiped: {error.message}",
        hint="If it happens again, use BuildKit 0.34 or later, or set spec.cache.keepHistory of the pool.",
    )


async def _builds(client: ControlClient) -> tuple[set[str], set[str]]:
    """The references of the builds that run, and of those that have ended."""
    running: set[str] = set()
    ended: set[str] = set()
    async with aclosing(client.history(early_exit=True)) as events:
        async for event in events:
            (running if event.type is BuildEventType.STARTED else ended).add(event.record.ref)
    return running - ended, ended


async def _until_ended(client: ControlClient, running: Collection[str]) -> None:
    """Returns when all these builds have ended. The history is read from its beginning, so that no end is missed."""
    left = set(running)
    async with aclosing(client.history()) as events:
        async for event in events:
            if event.type is not BuildEventType.STARTED:
                left.discard(event.record.ref)
            if not left:
                return
