"""The loop that keeps a copy up to date: list, watch, and after a failure pause and list again. There is only one.

It knows neither objects nor caches: the reflector (a cluster's documents) and the store's copies (of objects, from
SQLite too) say how to list, how to watch, and which failures end the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import NoReturn, TypeVar

from bkpool.core.backoff import Backoff
from bkpool.core.errors import Gone

Event = TypeVar("Event")

IN_A_STEP = 16
"""Events after which everything else in the loop has its turn, if they are there without waiting (rule 16,
docs/rules.md#r16)."""

LONG_WATCH = 10.0
"""Seconds after which a watch without a change was a good one: nothing may have changed."""


async def list_and_watch(
    list_all: Callable[[], Awaitable[str]],
    watch: Callable[[str], AsyncGenerator[Event, None]],
    on_event: Callable[[Event], None],
    on_failure: Callable[[Exception, float], bool],
    *,
    backoff: Backoff,
    pause: Callable[[float], Awaitable[None]],
    seconds: Callable[[], float] = time.monotonic,
) -> NoReturn:
    """Lists and watches until cancelled.

    Args:
        list_all: Lists, and puts the list into the cache. Returns the version from which to watch.
        watch: Yields the changes since that version. A watch that ends without an error is followed by a list.
        on_event: Puts a change into the cache.
        on_failure: Called in the exception's handler with the exception and the seconds until the next try. Returns
            whether there is a next try. 0 seconds: the history of the watch is gone, which is no fault.
        backoff: The pauses.
        pause: Waits that many seconds.
        seconds: Monotonic time.

    Raises:
        Exception: The one after which `on_failure` returned False.
    """
    at_once = True  # whether the next loss of the history is answered without a pause
    while True:
        began: float | None = None
        try:
            version = await list_all()
            count, began = 0, seconds()
            async with aclosing(watch(version)) as events:
                async for event in events:
                    backoff.succeeded()  # not after the list: a server that only fails to watch must not be flooded
                    at_once = True
                    on_event(event)
                    count += 1
                    if count % IN_A_STEP == 0:
                        await asyncio.sleep(0)
        except Exception as error:
            if began is not None and seconds() - began >= LONG_WATCH:
                backoff.succeeded()
                at_once = True
            wait = 0.0 if at_once and began is not None and isinstance(error, Gone) else backoff.failed()
            at_once = at_once and wait > 0
            if not on_failure(error, wait):
                raise
            await pause(wait)
