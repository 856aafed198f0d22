"""Health asks daemons in turn: here they are a few lines, tests/workers/test_hung.py has real ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from bkpool.core.errors import Unavailable
from bkpool.core.names import Slot
from bkpool.workers.health import DaemonLost, Health, ProbeLimits

FAST = ProbeLimits(interval=0.01, answer=60.0, retry=0.001, fresh=0.0, at_once=8, per_second=100_000)
IMPATIENT = replace(FAST, answer=0.01)
"""For daemons that hang. One that answers may be late, too, on a busy machine."""
ONE = Slot("default", "p", 0)


class World:
    """Daemons that answer, except those that are named."""

    def __init__(self, limits: ProbeLimits = FAST) -> None:
        self.asked: list[Slot] = []
        self.under_way = self.most = 0
        self.hung: set[Slot] = set()
        self.refusing: set[Slot] = set()
        self.lost: dict[Slot, DaemonLost] = {}
        self.crashing: set[Slot] = set()
        self.news = asyncio.Event()
        self.health = Health(self.ask, lambda _slot: self.news.set(), limits, jitter=lambda: 0.5)

    async def ask(self, slot: Slot) -> None:
        self.asked.append(slot)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if slot in self.hung:
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            if slot in self.refusing:
                raise Unavailable("nothing listens there")
            if slot in self.lost:
                raise self.lost[slot]
            if slot in self.crashing:
                raise LookupError("a bug")
        finally:
            self.under_way -= 1

    async def until(self, condition) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - no event announces a call
                await asyncio.sleep(0.001)


@pytest.fixture
def limits():
    return FAST


@pytest.fixture
async def world(limits):
    world = World(limits)
    running = asyncio.create_task(world.health.run())
    yield world
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_daemon_is_asked_again_and_again_until_it_ends(world):
    world.health.began(ONE)
    await world.until(lambda: len(world.asked) > 3)
    assert world.health.silence(ONE) is None
    assert not world.news.is_set(), "nothing has changed"
    world.health.ended(ONE)
    asked = len(world.asked)
    other = ONE._replace(number=1)
    world.health.began(other)
    await world.until(lambda: world.asked.count(other) > 3)
    assert world.asked.count(ONE) <= asked + 1


@pytest.mark.parametrize("limits", [IMPATIENT])
async def test_one_that_hangs_is_silent_for_longer_and_longer_until_it_answers(world):
    world.health.began(ONE)
    world.hung.add(ONE)
    await world.until(lambda: world.health.silence(ONE) is not None)
    first = world.health.silence(ONE).lasted
    await world.until(lambda: world.health.silence(ONE).lasted > 2 * first)
    world.news.clear()
    world.hung.clear()
    await world.until(lambda: world.health.silence(ONE) is None)
    assert world.news.is_set()


@pytest.mark.parametrize(("what", "builds_fail"), [("its socket", False), ("its cache", True)])
async def test_what_was_removed_of_one_is_named(world, what, builds_fail):
    world.health.began(ONE)
    world.lost[ONE] = DaemonLost(f"{what} was removed", builds_fail=builds_fail)
    await world.until(lambda: world.health.silence(ONE) is not None)
    found = world.health.silence(ONE)
    assert (found.lost, found.builds_fail) == (f"{what} was removed", builds_fail)


async def test_a_bug_in_a_probe_is_no_reason_and_does_not_end_the_probes(world):
    world.health.began(ONE)
    world.crashing.add(ONE)
    await world.until(lambda: len(world.asked) > 2)
    assert world.health.silence(ONE) is None


async def test_a_fresh_answer_counts_and_callers_share_a_probe():
    world = World(replace(FAST, fresh=60.0))
    world.health.began(ONE)
    assert await world.health.answers(ONE)
    assert world.asked == []
    answers = await asyncio.gather(*(world.health.answers(ONE, fresh=False) for _ in range(300)))
    assert all(answers)
    assert world.asked == [ONE], "300 callers at once ask once"


async def test_nobody_is_given_a_daemon_that_hangs_refuses_or_is_not_known():
    world = World(IMPATIENT)
    for kind in (world.hung, world.refusing):
        world.health.began(ONE)
        kind.add(ONE)
        assert not await world.health.answers(ONE)
        kind.clear()
        async with asyncio.timeout(60):
            while not await world.health.answers(ONE):  # until it answers in time again
                pass
        world.health.ended(ONE)
    assert not await world.health.answers(ONE)


async def test_an_answer_of_the_daemon_before_says_nothing_about_the_next_one():
    world = World(FAST)
    world.hung.add(ONE)
    world.health.began(ONE)
    waiting = asyncio.create_task(world.health.answers(ONE))
    await world.until(lambda: world.asked)
    world.health.ended(ONE)
    world.health.began(ONE)
    waiting.cancel()
    assert world.health.silence(ONE) is None


@pytest.mark.slow
@pytest.mark.any_python
async def test_3000_daemons_are_asked_few_at_once_though_a_tenth_of_them_hangs():
    world = World(replace(IMPATIENT, interval=0.001))
    slots = [Slot("default", "p", number) for number in range(3000)]
    world.hung.update(slots[::10])
    for slot in slots:
        world.health.began(slot)
    running = asyncio.create_task(world.health.run())
    await world.until(lambda: len(set(world.asked)) == 3000)
    assert world.most <= FAST.at_once
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
