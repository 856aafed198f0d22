from __future__ import annotations

from pathlib import Path

import pytest

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.workers.processes.slot_files import CacheRecord, CacheState, DaemonRecord, SlotFiles, slots_on_disk
from support.unwritable import unwritable


@pytest.fixture
def files(tmp_path: Path) -> SlotFiles:
    return SlotFiles(tmp_path, Slot("default", "default", 0))


@pytest.mark.parametrize(
    ("record", "owner", "must_wipe"),
    [
        (CacheRecord.of(None), None, False),
        (CacheRecord.of(None), "anna", False),
        (CacheRecord.of("anna"), "anna", False),
        (CacheRecord.of("anna"), None, False),
        (CacheRecord.of("anna"), "bert", True),
        (CacheRecord(CacheState.WIPING), None, True),
        (CacheRecord(CacheState.WIPING), "anna", True),
    ],
)
def test_a_cache_must_be_wiped_before_another_owner_may_use_it(record, owner, must_wipe):
    assert record.must_be_wiped_for(owner) is must_wipe


def test_records_are_read_as_they_were_written(files):
    assert files.read_cache() is None
    assert files.read_daemon() is None
    files.write_cache(CacheRecord.of("anna"))
    files.write_daemon(DaemonRecord("uid-1", "boot", 7, 8, "/s"))
    assert files.read_cache() == CacheRecord.of("anna")
    assert files.read_daemon() == DaemonRecord("uid-1", "boot", 7, 8, "/s")
    assert {entry.name for entry in files.directory.iterdir()} == {"cache.json", "process.json"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "owned"}', '{"state": "lent", "owner": null}', "\xff"])
def test_a_cache_whose_record_says_nothing_must_be_wiped(files, text):
    files.root.mkdir(parents=True)
    (files.directory / "cache.json").write_text(text, encoding="latin-1")
    (files.directory / "process.json").write_text(text, encoding="latin-1")
    assert files.read_cache() == CacheRecord(CacheState.WIPING)
    assert files.read_daemon() is None


def test_one_old_log_is_kept(files):
    for run in ("first", "second", "third"):
        files.rotate_log()
        files.log.write_text(run)
    assert files.log.name == "default.default-worker-0.log"
    assert sorted(entry.read_text() for entry in files.log.parent.iterdir()) == ["second", "third"]


def test_only_slots_are_taken_for_slots(tmp_path):
    for path in ("default/default/0", "team-a/go/12", "default/default/01", "default/default/x", "Up/default/1"):
        (tmp_path / "slots" / path).mkdir(parents=True)
    assert set(slots_on_disk(tmp_path)) == {Slot("default", "default", 0), Slot("team-a", "go", 12)}


def test_a_home_that_cant_be_written_is_a_fault_of_the_host(tmp_path):
    (tmp_path / "slots").write_text("a file where a directory should be")
    with pytest.raises(HostFault, match="cannot be written"):
        SlotFiles(tmp_path, Slot("default", "default", 0)).write_cache(CacheRecord.of("anna"))


def test_removing_a_slot_leaves_its_neighbours(files, tmp_path):
    files.write_cache(CacheRecord.of(None))
    other = SlotFiles(tmp_path, Slot("default", "default", 1))
    other.write_cache(CacheRecord.of("anna"))
    files.remove()
    assert list(slots_on_disk(tmp_path)) == [other.slot]
    other.remove()
    assert list((tmp_path / "slots").iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda files: files.write_cache(CacheRecord.of("anna")),
        lambda files: files.write_daemon(DaemonRecord("uid-1", "boot")),
        SlotFiles.forget_daemon,
        lambda files: files.write_config("# empty"),
        SlotFiles.rotate_log,
        SlotFiles.set_root_aside,
        SlotFiles.make_scratch,
        SlotFiles.remove,
    ],
)
def test_a_home_that_cannot_be_written_is_a_fault_of_the_host(files, write):
    files.write_daemon(DaemonRecord("uid-1", "boot"))
    files.rotate_log()
    files.log.write_text("of the last run")
    files.root.mkdir()
    with unwritable(files.home), pytest.raises(HostFault, match="cannot be written") as refused:
        write(files)
    assert refused.value.code == "Permission"
