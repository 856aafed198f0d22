"""File work of slots that takes long, or hangs with its disk."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.slot_threads import FileWork, SlotThreads

LONG = 60.0
SLOT, OTHER = Slot("default", "default", 0), Slot("default", "default", 1)


@pytest.fixture
def threads():
    made = SlotThreads(ProcessLimits(file_timeout=0.05))
    yield made
    made.close()


@pytest.fixture
def hangs():
    """Work that hangs until the test lets it go on."""
    go_on = threading.Event()
    yield go_on
    go_on.set()


async def test_work_that_hangs_is_given_up_and_its_slot_is_not_used_until_it_has_ended(threads, hangs):
    begun = threading.Event()

    def work():
        begun.set()
        hangs.wait()

    while not begun.is_set():  # on a busy machine it may be given up before a thread has it
        with pytest.raises(HostFault, match="files of default/default-worker-0 could not be") as fault:
            await threads.run(FileWork.RECORD, SLOT, work)
    assert fault.value.code == "DiskHangs"
    with pytest.raises(HostFault, match="could not be"):
        await threads.run(FileWork.PREPARE, SLOT, int)
    threads._seconds = LONG  # what follows does not hang
    assert await threads.run(FileWork.RECORD, OTHER, int, "7") == 7
    hangs.set()
    async with asyncio.timeout(60):
        while SLOT in threads._running:  # noqa: ASYNC110 - a thread makes it true
            await asyncio.sleep(0.001)
    assert await threads.run(FileWork.RECORD, SLOT, int, "8") == 8


async def test_work_that_never_got_a_thread_is_not_done_later(threads, hangs):
    begun, done = [], []

    def work():
        begun.append(1)
        hangs.wait()

    short, threads._seconds = threads._seconds, LONG
    places = [Slot("default", "default", number) for number in range(10, 20)]
    waiting = [asyncio.create_task(threads.run(FileWork.WIPE, slot, work)) for slot in places]
    async with asyncio.timeout(60):
        while len(begun) < ProcessLimits().concurrent_wipes:  # noqa: ASYNC110 - threads make it true
            await asyncio.sleep(0.001)
    threads._seconds = short
    with pytest.raises(HostFault):
        await threads.run(FileWork.WIPE, SLOT, done.append, 1)
    assert SLOT not in threads._running
    threads._seconds = LONG
    hangs.set()
    await asyncio.gather(*waiting)
    await threads.run(FileWork.WIPE, OTHER, int)
    assert done == []


async def test_a_kind_of_work_that_takes_all_of_its_threads_delays_no_other_and_no_name(hangs):
    threads = SlotThreads(ProcessLimits())
    slots = [Slot("default", "default", number) for number in range(40)]
    wipes = [asyncio.create_task(threads.run(FileWork.WIPE, slot, hangs.wait)) for slot in slots]
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        for work in (FileWork.PREPARE, FileWork.RECORD):
            assert await threads.run(work, Slot("default", "other", 0), int, "7") == 7
        found = await asyncio.get_running_loop().getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)
        assert found
    hangs.set()
    assert await asyncio.gather(*wipes) == [True] * 40
    threads.close()


async def test_a_time_out_of_the_work_itself_is_no_disk_that_hangs(threads):
    def fails():
        raise TimeoutError("by the network")

    with pytest.raises(TimeoutError, match="by the network"):
        await threads.run(FileWork.PREPARE, None, fails)
