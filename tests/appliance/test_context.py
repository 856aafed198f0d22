"""What the roles of a process share: the watched main loop, one registry, background tasks that end the process."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial

import pytest

from bkpool.appliance.end_deadline import EndDeadline
from bkpool.appliance.roles.context import open_context
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import Shutdown, run_until_stopped
from bkpool.core.errors import BkpoolError
from bkpool.settings import Settings
from support.captured_logs import capture_logs


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


async def test_the_main_loop_is_watched_until_the_stack_is_closed(tmp_path):
    async with AsyncExitStack() as stack:
        open_context(stack, RunOptions(home=tmp_path, cache=tmp_path), Shutdown())
        assert "watchdog" in threads()
    assert "watchdog" not in threads()


async def test_the_settings_say_when_a_loop_counts_as_blocked(tmp_path):
    settings = Settings.model_validate({"metrics": {"loop_timeout": timedelta(milliseconds=50)}})
    async with AsyncExitStack() as stack:
        options = RunOptions(home=tmp_path, cache=tmp_path, settings=settings)
        context = open_context(stack, options, Shutdown())
        blocked = partial(context.registry.get_sample_value, "bkpool_loop_blocked_total", {"loop": "main"})
        async with asyncio.timeout(60):
            while not blocked():
                time.sleep(0.11)  # noqa: ASYNC251 - blocks the loop for less than the default
                await asyncio.sleep(0)


async def test_a_failed_background_task_ends_the_process_with_its_error(tmp_path):
    closed = []

    async def fail() -> None:
        raise RuntimeError("a role failed")

    async def start(stack: AsyncExitStack, shutdown: Shutdown) -> None:
        stack.callback(closed.append, "opened first")
        context = open_context(stack, RunOptions(home=tmp_path, cache=tmp_path), shutdown)
        await context.run_in_background(stack, fail())
        stack.callback(closed.append, "opened last")

    async with asyncio.timeout(60):
        with pytest.raises(RuntimeError, match="a role failed"):
            await run_until_stopped(start)
    assert closed == ["opened last", "opened first"]


async def test_a_thread_that_fails_ends_the_process_with_a_sentence():
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    async def start(_stack: AsyncExitStack, _shutdown: Shutdown) -> None:
        threading.Thread(target=fail, name="gateway-0").start()

    hook = threading.excepthook
    async with asyncio.timeout(60):
        with pytest.raises(BkpoolError, match=r"the thread 'gateway-0' .* failed \(ZeroDivisionError: a defect\)"):
            await run_until_stopped(start)
    assert threading.excepthook is hook


async def test_an_end_that_takes_too_long_is_ended_and_says_what_it_waits_for():
    ended, overdue = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def never_ends() -> None:
        await ended.wait()

    async def start(stack: AsyncExitStack, shutdown: Shutdown) -> None:
        stack.push_async_callback(never_ends)
        shutdown.fail(RuntimeError("a role failed"))

    deadline = EndDeadline(0.01, end=lambda: loop.call_soon_threadsafe(overdue.set))
    with capture_logs() as logs, deadline:
        process = asyncio.create_task(run_until_stopped(start, deadline))
        async with asyncio.timeout(60):
            await overdue.wait()
            ended.set()
            with pytest.raises(RuntimeError, match="a role failed"):
                await process
    (line,) = (line for line in logs if line["event"] == "appliance.end_overdue")
    assert any("never_ends" in place or "run_until_stopped" in place for place in line["waiting"])


async def test_the_deadline_begins_only_when_no_build_is_waited_for():
    class Noted(EndDeadline):
        def start(self) -> None:
            events.append("deadline")

    events: list[str] = []

    async def start(stack: AsyncExitStack, shutdown: Shutdown) -> None:
        async def drain() -> None:
            events.append("drain")
            shutdown.drained()

        stack.push_async_callback(drain)
        shutdown.requested.set()

    await run_until_stopped(start, Noted())
    assert events == ["drain", "deadline"]
