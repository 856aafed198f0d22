"""A watch that has many events at once leaves turns to everything else in the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise

import pytest

from bkpool.core.backoff import Backoff
from bkpool.core.errors import Gone, Unavailable
from bkpool.kube.list_and_watch import IN_A_STEP, LONG_WATCH, list_and_watch


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


async def pauses_after(*watches: tuple[float, Exception]) -> list[float]:
    """The pauses after watches without a change that last so long and end so."""
    now = 0.0
    left = list(watches)
    pauses: list[float] = []

    async def list_all() -> str:
        return "1"

    async def watch(_version: str) -> AsyncGenerator[int, None]:
        nonlocal now
        lasts, error = left.pop(0)
        now += lasts
        raise error
        yield 0

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    with pytest.raises(type(watches[-1][1])):
        await list_and_watch(
            list_all, watch, print, lambda *_: bool(left), backoff=Backoff(5.0), pause=pause, seconds=lambda: now
        )
    return pauses


AWAY, GONE = Unavailable("away"), Gone("too long ago")


async def test_the_pause_of_a_quiet_watch_begins_anew_after_one_that_lasted():
    short, long = (0.0, AWAY), (LONG_WATCH, AWAY)
    assert await pauses_after(short, short, short, long, short, short) == [0.1, 0.2, 0.4, 0.1, 0.2]


async def test_a_history_that_is_gone_is_listed_again_at_once_but_not_again_and_again():
    short, long = (0.0, GONE), (LONG_WATCH, GONE)
    assert await pauses_after(short, short, short, long, short, long, short) == [0.0, 0.1, 0.2, 0.0, 0.1, 0.0]
