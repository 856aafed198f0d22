"""The client of the Control API, with a real buildkitd."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

import pytest

from bkpool.buildkit import BuildEventType, connect
from bkpool.core.errors import Unavailable
from bkpool.core.names import Slot
from bkpool.toolchain.table import Tool, release_of
from support.objects import pool as a_pool
from support.processes import freeze

SLOT = Slot("default", "default", 0)


async def no_report(message: str) -> None:
    raise AssertionError(message)


async def run(build) -> None:
    process = await build
    text = (await process.communicate())[0].decode()
    assert process.returncode == 0, text


async def test_a_real_daemon_reports_its_version_and_its_builds(runtime, build):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    async with connect(endpoint) as client:
        assert (await client.info()).version.removeprefix("v") == release_of(Tool.BUILDKITD).version
        (worker,) = await client.list_workers()
        assert worker.platforms[0].startswith("linux/")

        async with aclosing(client.history()) as history:
            first = asyncio.create_task(anext(history))
            await run(build(endpoint))
            started = await first
            async for event in history:
                if event.type is BuildEventType.COMPLETE:
                    break
        assert started.type is BuildEventType.STARTED
        record = event.record
        assert record.ref == started.record.ref
        assert (record.error_code, record.error) == (0, "")
        assert record.created_at < record.completed_at
        assert record.total_steps >= record.completed_steps > 0
        assert record.log.media_type == "application/vnd.buildkit.status.v0"
        assert record.log.digest.startswith("sha256:")

        await run(build(endpoint))
        async with aclosing(client.history(early_exit=True)) as history:
            events = [seen async for seen in history]
        assert len(events) == 2
        assert max(seen.record.cached_steps for seen in events) > 0

        usage = await client.disk_usage()
        assert sum(record.size for record in usage) > 0
        assert {"regular"} <= {record.record_type for record in usage}
        async with aclosing(client.prune(include_internal=True)) as pruned:
            deleted = [record.id async for record in pruned]
        assert deleted
        left = {record.id for record in await client.disk_usage()}
        assert not left & set(deleted)


@pytest.mark.parametrize("call", ["unary", "stream"])
async def test_a_daemon_that_is_killed_in_the_middle_of_a_call_is_noticed_at_once(runtime, call):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    async with connect(endpoint) as client:
        pid = client.peer_pid
        freeze(pid)  # so that it cannot answer before it is killed
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="broke off the call"):
            await (client.info() if call == "unary" else anext(client.history()))
