"""A start gives its permit back on every way out, and what runs for it ends: also where no descriptor is left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bkpool.core.errors import BkpoolError, HostFault, WorkerFailed
from bkpool.core.names import Slot
from bkpool.workers import DaemonState
from bkpool.workers.processes import daemon as daemon_module
from bkpool.workers.processes import launcher
from bkpool.workers.processes.daemon import Daemon
from bkpool.workers.processes.launcher import Launcher
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.process_table import Process
from bkpool.workers.processes.runtime import ProcessRuntime
from support.descriptors import descriptors_left
from support.objects import pool as a_pool

pytestmark = pytest.mark.slow

POOL = a_pool()
SLOT = Slot("default", "default", 0)
SLOTS = [Slot("default", "default", number) for number in range(12)]


async def no_report(message):
    raise AssertionError(message)


def running(home):
    """The processes that were started for this home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(home / "slots").encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def free_permits(runtime):
    return runtime.daemons._starting._value


@pytest.fixture
async def made(tmp_path, binaries):
    """Makes runtimes, which must give all permits back and leave no process."""
    runtimes = []

    def make(programs=binaries, **limits):
        runtimes.append(ProcessRuntime(tmp_path / "home", programs, limits=ProcessLimits(**limits)))
        return runtimes[-1]

    yield make
    for runtime in runtimes:
        await runtime.close(stop_workers=True)
        assert free_permits(runtime) == ProcessLimits().concurrent_starts
    assert running(tmp_path / "home") == []


@pytest.mark.parametrize("kept_free", [launcher._FREE_DESCRIPTORS, 0], ids=["checked", "not checked"])
async def test_with_too_few_descriptors_some_workers_run_and_nothing_is_lost(made, monkeypatch, kept_free):
    """Without the check before a start they run out in its midst, at another step each time."""
    monkeypatch.setattr(launcher, "_FREE_DESCRIPTORS", kept_free)
    runtime = made()
    with descriptors_left(kept_free + 8 if kept_free else 22):
        starts = (runtime.daemons.start(slot, "uid", None, POOL, no_report) for slot in SLOTS)
        async with asyncio.timeout(60):
            results = await asyncio.gather(*starts, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        assert 0 < len(failures) < len(SLOTS)
        assert {type(failure) for failure in failures} <= {HostFault, WorkerFailed}
        assert any("too many open files" in failure.message for failure in failures)
        assert free_permits(runtime) == ProcessLimits().concurrent_starts
        seen = runtime.daemons.observe()
        assert len(seen) == len(SLOTS) - len(failures)
        async with asyncio.timeout(60):
            await asyncio.gather(*(runtime.daemons.stop(slot) for slot in seen))


async def test_a_daemon_that_answers_but_cannot_be_watched_is_ended(made, tmp_path, monkeypatch):
    """Only the failure of its pidfd is made up, so that it comes at this step."""

    def none_left(_pid):
        raise OSError(24, "Too many open files")

    runtime = made()
    with monkeypatch.context() as lacking:
        lacking.setattr(daemon_module, "Process", none_left)
        with pytest.raises(HostFault, match="buildkitd cannot be watched: there are too many open files"):
            await runtime.daemons.start(SLOT, "uid", None, POOL, no_report)
    assert running(tmp_path / "home") == []
    await runtime.daemons.start(SLOT, "uid", None, POOL, no_report)


class TestWaysOut:
    """Each leaves the slot so that it can be started afterwards."""

    @pytest.fixture
    async def runtime(self, made):
        runtime = made()
        yield runtime
        assert free_permits(runtime) == ProcessLimits().concurrent_starts
        await runtime.daemons.start(SLOT, "uid", None, POOL, no_report)
        assert runtime.daemons.observe()[SLOT].state is DaemonState.READY

    @pytest.mark.parametrize(
        ("owner", "method", "error"),
        [
            (Launcher, "prepare", OSError(5, "Input/output error")),
            (Launcher, "end_all_of", HostFault("no")),
            (Launcher, "clear", OSError(5, "Input/output error")),
            (Daemon, "start", RuntimeError("a bug")),
            (Process, "__init__", OSError(5, "Input/output error")),
        ],
    )
    async def test_of_an_error_at(self, runtime, monkeypatch, owner, method, error):
        def fails(*_arguments):
            raise error

        with monkeypatch.context() as failing:
            failing.setattr(owner, method, fails)
            failing.setattr(runtime.daemons, "_limits", ProcessLimits(start_timeout=1))
            with pytest.raises((BkpoolError, RuntimeError)):
                await runtime.daemons.start(SLOT, "uid", None, a_pool(buildkit_config=_broken(method)), no_report)

    async def test_of_a_program_that_cannot_be_run(self, runtime, monkeypatch):
        with monkeypatch.context() as failing:
            failing.setattr(launcher, "entering", lambda *_, **__: ["/no/program"])
            with pytest.raises(HostFault, match="/no/program cannot be run"):
                await runtime.daemons.start(SLOT, "uid", None, POOL, no_report)

    async def test_of_a_start_that_is_cancelled(self, runtime, tmp_path):
        starting = asyncio.create_task(runtime.daemons.start(SLOT, "uid", None, POOL, no_report))
        while not running(tmp_path / "home"):  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.001)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting


def _broken(method):
    """A configuration with which buildkitd ends at once, where the method is called after the end only."""
    return "debug = 3" if method in {"end_all_of", "clear"} else ""


async def test_one_daemon_that_does_not_end_keeps_no_other_from_ending(made, tmp_path, monkeypatch):
    runtime = made()
    for slot in SLOTS[:3]:
        await runtime.daemons.start(slot, "uid", None, POOL, no_report)
    real, first = Daemon.stop, runtime._table.get(SLOTS[0]).daemon

    async def stop(daemon, grace):
        if daemon is first:
            raise WorkerFailed(f"process {daemon.pid} has not ended")
        await real(daemon, grace)

    with monkeypatch.context() as hanging:
        hanging.setattr(Daemon, "stop", stop)
        with pytest.raises(WorkerFailed, match=f"process {first.pid} has not ended"):
            await runtime.close(stop_workers=True)
    assert str(first.pid) in running(tmp_path / "home")
    after = made()
    await after.adopt(to_stop=True)
    assert set(after.daemons.observe()) == {SLOTS[0]}
