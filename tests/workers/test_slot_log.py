"""The log of a worker is bounded while a process writes to it, and its end can still be read."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from bkpool.core.names import Slot
from bkpool.workers.processes import slot_log
from bkpool.workers.processes.daemon import log_tail
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.log_limit import SlotLogs
from bkpool.workers.processes.slot_threads import SlotThreads
from bkpool.workers.processes.slots import SlotTable
from support.small_disk import fill, make_room, small_disk

SIZE = 1000
SLOT = Slot("default", "p", 0)

WRITER = """
import sys
for line in sys.stdin:
    number, text = line.split()
    for n in range(int(number)):
        print(f"{text} {n:05}", flush=True)
    print("written", file=sys.stderr, flush=True)
"""


@pytest.fixture
def table(tmp_path):
    return SlotTable(tmp_path, SlotThreads(ProcessLimits()))


@pytest.fixture
def slot(table):
    slot = table.get(SLOT)
    slot.files.log.parent.mkdir(parents=True)
    return slot


@pytest.fixture
def write(slot):
    """Lets a process that has the log as its stdout, as buildkitd has it, write lines of ten bytes."""
    with slot.files.log.open("ab") as log:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def write(number, text):
        print(number, text, file=writer.stdin)
        assert writer.stderr.readline() == "written\n"

    with writer:
        yield write
        writer.stdin.close()


async def test_a_log_that_is_too_large_begins_again_and_the_end_of_it_is_kept(table, slot, write):
    logs, log = SlotLogs(table, SIZE), slot.files.log
    write(100, "one")
    await logs.bound_all()
    assert log.stat().st_size == SIZE  # not too large yet
    write(50, "two")
    await logs.bound_all()
    earlier = slot_log.earlier_part(log)
    assert log.read_bytes() == b""
    assert earlier.read_text().splitlines() == [
        *(f"one {n:05}" for n in range(51, 100)),
        *(f"two {n:05}" for n in range(50)),
    ]
    write(3, "six")
    assert log.read_text() == "six 00000\nsix 00001\nsix 00002\n"
    assert slot_log.read_end(log, 50).decode().splitlines() == [
        "two 00048",
        "two 00049",
        *log.read_text().split("\n")[:3],
    ]
    assert log_tail(log).splitlines()[-4:] == ["two 00049", "six 00000", "six 00001", "six 00002"]


async def test_a_new_start_and_a_wipe_leave_nothing_of_the_earlier_part(table, slot, write):
    files = slot.files
    write(200, "one")
    await SlotLogs(table, SIZE).bound_all()
    assert slot_log.earlier_part(files.log).exists()
    files.rotate_log()
    assert not slot_log.earlier_part(files.log).exists()
    assert log_tail(files.log) == ""
    slot_log.earlier_part(files.log).touch()
    files.remove()
    assert not list(files.log.parent.iterdir())


async def test_a_log_is_not_bounded_while_its_slot_is_started_or_wiped(table, slot, write):
    write(200, "one")
    async with slot.lock:
        bounding = asyncio.create_task(SlotLogs(table, SIZE).bound_all())
        await asyncio.sleep(0)
        slot.files.log.unlink()
    await bounding
    assert not list(slot.files.log.parent.iterdir())


def test_on_a_full_disk_a_log_that_is_too_large_makes_room(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        log = disk / "w.log"
        with log.open("ab", buffering=0) as daemon:
            daemon.write(b"line\n" * 50_000)
            fill(disk)
            slot_log.bound(log, 100_000)
            assert log.stat().st_size == 0
            daemon.write(b"after\n")
            assert log.read_bytes() == b"after\n"
            assert [path.name for path in sorted(disk.iterdir())] == ["fill", "w.log"]
        make_room(disk)


async def test_it_looks_again_and_again_although_a_look_fails(table, monkeypatch):
    looks = []

    async def pause(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise asyncio.CancelledError

    async def fail():
        raise OSError("the disk hangs")

    logs = SlotLogs(table, SIZE, pause=pause)
    monkeypatch.setattr(logs, "bound_all", fail)
    with pytest.raises(asyncio.CancelledError):
        await logs.run()
    assert len(looks) == 3
