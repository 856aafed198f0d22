"""`/ready` asks every part of a process, and says which does not answer."""

from __future__ import annotations

import asyncio
import threading

import pytest

from bkpool.appliance.ready_checks import ReadyChecks
from bkpool.core.errors import DiskFull
from bkpool.store.sqlite import SqliteStore
from support.world import running_world


async def answers() -> None:
    pass


async def never_answers() -> None:
    await asyncio.Event().wait()


async def all_answer(checks: ReadyChecks) -> None:
    """Asks until every part has answered in time. A part that answers at once may be late on a busy machine."""
    async with asyncio.timeout(60):
        while await checks.trouble():
            pass


async def test_the_parts_that_do_not_answer_are_named_and_the_others_are_not():
    checks = ReadyChecks(timeout=0.01)
    assert await checks.trouble() is None

    async def full() -> None:
        raise DiskFull("the file system /x is full")

    async def fails() -> None:
        raise ZeroDivisionError

    checks.add("the controller", answers)
    await all_answer(checks)
    ends = [checks.add("the store", never_answers), checks.add("the disk", full), checks.add("the gateway", fails)]
    assert await checks.trouble() == (
        "the store does not answer; the file system /x is full; the gateway does not answer"
    )
    for end in ends:
        end()
    await all_answer(checks)


async def test_a_part_that_was_replaced_is_not_removed_by_the_one_of_before():
    checks = ReadyChecks(timeout=0.01)
    end = checks.add("the controller", answers)
    checks.add("the controller", never_answers)
    end()
    assert await checks.trouble() == "the controller does not answer"


async def test_however_many_ask_a_part_is_asked_once_and_one_who_leaves_ends_nothing_for_the_others():
    checks, asked, is_asked, may_answer = ReadyChecks(20), [], asyncio.Event(), asyncio.Event()

    async def answers_later() -> None:
        asked.append("")
        is_asked.set()
        await may_answer.wait()

    checks.add("the store", answers_later)
    callers = [asyncio.create_task(checks.trouble()) for _ in range(100)]
    await is_asked.wait()
    callers[0].cancel()
    may_answer.set()
    assert set(await asyncio.gather(*callers[1:])) == {None}
    assert len(asked) == 1


@pytest.mark.parametrize("thread", ["_reader", "_writer"])
async def test_a_store_answers_unless_one_of_its_threads_hangs(tmp_path, thread):
    store = await SqliteStore.open(tmp_path / "state.db")
    checks, may_go_on = ReadyChecks(timeout=0.01), threading.Event()
    checks.add("the store", store.answers)
    async with asyncio.timeout(60):
        await all_answer(checks)
        hung = asyncio.create_task(getattr(store, thread).run(lambda _tables: may_go_on.wait(60)))
        await asyncio.sleep(0)
        assert await checks.trouble() == "the store does not answer"
        may_go_on.set()
        await hung
        await all_answer(checks)
    await store.close()


async def test_the_controller_answers_without_deciding_anything(tmp_path):
    async with running_world(tmp_path) as world, asyncio.timeout(60):
        await world.pool(scaling={"min": 1})
        await world.until(lambda: world.runtime.daemons)
        controller, name = world.controller, "buildkit_controller_decisions_total"
        before, answers = None, 0
        while answers < 20:  # without a decision between them
            busy = controller._actions or controller._pool_work.tasks
            await controller.answers()
            decisions = world.registry.get_sample_value(name)
            answers = answers + 1 if decisions == before and not busy else 0
            before = decisions
