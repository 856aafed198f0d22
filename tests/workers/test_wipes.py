"""Caches that take long to remove, with a real `rm` that waits until the test lets it go on."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

import pytest

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.workers.processes import environment
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.runtime import ProcessRuntime
from support.objects import pool as a_pool

OTHERS = [Slot("default", "other", number) for number in range(6)]
SLOT = Slot("default", "default", 0)
POOL = a_pool()


async def no_report(message):
    raise AssertionError(message)


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Removals wait for the file `go-on`, and leave a file for each that has begun."""
    programs, begun = tmp_path / "bin", tmp_path / "begun"
    programs.mkdir()
    begun.mkdir()
    script = f"""#!/bin/sh
touch {begun}/$$
until [ -e {tmp_path}/go-on ]; do /bin/sleep 0.05; done
PATH={environment.PATH}
exec rm "$@"
"""
    (programs / "rm").write_text(script)
    (programs / "rm").chmod(0o755)
    monkeypatch.setattr(environment, "PATH", f"{programs}:{environment.PATH}")
    return tmp_path


@pytest.fixture
async def used(slow, binaries):
    """A runtime with six caches of anna's."""
    runtime = ProcessRuntime(slow / "home", binaries, limits=ProcessLimits(wipe_timeout=60))
    for slot in OTHERS:
        await runtime.caches.own(slot, "anna")
        (slow / "home/slots/default/other" / str(slot.number) / "root").mkdir()
    yield runtime
    (slow / "go-on").touch()
    await runtime.purge()
    await runtime.close(stop_workers=True)


async def begun(slow, number):
    async with asyncio.timeout(60):
        while len(list((slow / "begun").iterdir())) < number:  # noqa: ASYNC110 - other processes make it true
            await asyncio.sleep(0.005)


async def test_six_slow_wipes_stop_no_start_no_mark_and_no_name_of_another_pool(slow, used):
    wipes = [asyncio.create_task(used.caches.wipe(slot)) for slot in OTHERS]
    await begun(slow, ProcessLimits().concurrent_wipes)
    async with asyncio.timeout(60):
        assert await asyncio.get_running_loop().getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)
        await used.caches.own(SLOT, "bert")
        await used.daemons.start(SLOT, "uid", "bert", POOL, no_report)
        await used.daemons.stop(SLOT)
    assert not any(wipe.done() for wipe in wipes)
    (slow / "go-on").touch()
    await asyncio.gather(*wipes)
    assert used.caches.owners() == {SLOT: "bert"}
    assert not (slow / "home/slots/default/other").exists()


async def test_a_wipe_that_is_given_up_ends_its_process_and_the_next_run_completes_it(slow, used, binaries):
    wipe = asyncio.create_task(used.caches.wipe(OTHERS[0]))
    await begun(slow, 1)
    wipe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wipe
    (script,) = (slow / "begun").iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(script.name), 0)
    assert list((slow / "home/slots/default/other/0").glob("wiped-*"))
    (slow / "go-on").touch()
    after = ProcessRuntime(slow / "home", binaries)
    await after.adopt()
    assert OTHERS[0] not in after.caches.owners()
    await after.close(stop_workers=False)


async def test_a_wipe_that_takes_too_long_is_an_error_and_its_slot_is_used_only_when_it_is_done(slow, binaries):
    runtime = ProcessRuntime(slow / "home", binaries, limits=ProcessLimits(wipe_timeout=0.2))
    await runtime.caches.own(SLOT, "anna")
    (slow / "home/slots/default/default/0/root").mkdir()
    for _ in range(2):
        with pytest.raises(HostFault, match=r"could not be removed within 0\.2 s") as fault:
            await runtime.daemons.start(SLOT, "uid", "bert", POOL, no_report)
        assert fault.value.code == "DiskHangs"
    (slow / "go-on").touch()
    async with asyncio.timeout(60):
        while runtime.caches.owners() != {SLOT: "bert"}:
            with suppress(HostFault):  # a busy machine needs more than 0.2 s for the wipe, too
                await runtime.daemons.start(SLOT, "uid", "bert", POOL, no_report)
    await runtime.purge()
    await runtime.close(stop_workers=True)


async def test_what_rm_says_is_in_the_error_however_much_it_is(tmp_path, binaries, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "rm").write_text("#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' x; echo 'immutable'; exit 1\n")
    (programs / "rm").chmod(0o755)
    runtime = ProcessRuntime(tmp_path / "home", binaries)
    await runtime.caches.own(SLOT, "anna")
    (tmp_path / "home/slots/default/default/0/root").mkdir()
    with monkeypatch.context() as failing:
        failing.setattr(environment, "PATH", f"{programs}:{environment.PATH}")
        with pytest.raises(HostFault, match=r"cannot be removed: x{500}$") as fault:
            await runtime.caches.wipe(SLOT)
    assert "by hand" in fault.value.hint
    await runtime.purge()
    await runtime.close(stop_workers=True)
