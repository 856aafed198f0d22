"""A watch that has many events at once leaves turns to everything else in the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise

from bkpool.core.backoff import Backoff
from bkpool.kube.list_and_watch import IN_A_STEP, list_and_watch


async def test_others_have_their_turn_between_many_events():
    taken: list[int] = []
    seen: list[int] = []
    all_taken = asyncio.Event()

    async def list_all() -> str:
        return "1"

    async def watch(_version: str) -> AsyncGenerator[int, None]:
        for number in range(4 * IN_A_STEP):
            yield number
        all_taken.set()
        await asyncio.Event().wait()

    async def other() -> None:
        while not all_taken.is_set():
            seen.append(len(taken))
            await asyncio.sleep(0)

    following = asyncio.create_task(
        list_and_watch(
            list_all,
            watch,
            taken.append,
            lambda *_: False,
            backoff=Backoff(1.0, jitter=lambda: 0.0),
            pause=asyncio.sleep,
        )
    )
    await other()
    following.cancel()
    assert taken == [*range(4 * IN_A_STEP)], "in their order"
    assert max(after - before for before, after in pairwise(seen)) <= IN_A_STEP
