"""What a slot keeps on disk: its cache, a record of the owner of the cache, and a record of its daemon.

A record is durably on disk before what it announces happens: the owner before the first use of the cache, the daemon
before its start. So a crash leaves at worst a record of something that never happened. A cache whose record cannot be
read is wiped and never handed out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bkpool.core.cache_owner import must_be_wiped
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.core.names import Slot, check_name
from bkpool.home.disk import disk_full, is_full
from bkpool.toolchain.descriptor_limit import is_lack_of_descriptors, too_many_open_files
from bkpool.workers.processes import slot_log


class CacheState(StrEnum):
    """Who may use a cache: rule 3 (docs/rules.md#r3)."""

    CLEAN = "clean"
    OWNED = "owned"
    WIPING = "wiping"


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """Who owns the cache of a slot."""

    state: CacheState
    owner: str | None = None
    """Digest of the owner; only in state `owned`."""

    @classmethod
    def of(cls, owner: str | None) -> CacheRecord:
        """The record of a cache that this owner has, or that nobody has used (None)."""
        return cls(CacheState.OWNED, owner) if owner else cls(CacheState.CLEAN)

    def must_be_wiped_for(self, owner: str | None) -> bool:
        """Whether it must be wiped before this owner may use it. None, nobody yet, may have any usable cache."""
        return self.state is CacheState.WIPING or must_be_wiped(self.owner, owner)


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    """The daemon in a slot. It is written before the start, and again with the process once that has answered."""

    worker_uid: str
    boot_id: str
    pid: int | None = None
    """The process id of buildkitd itself. None: it has not answered yet."""
    start_time: int | None = None
    """In clock ticks since boot. Together with pid and boot id it identifies one process for ever."""
    socket: str | None = None
    isolation: str = ""
    """What was done to isolate it. One that was isolated in another way is not taken over."""
    confinement: str = ""
    """Digest of what the pool's spec opened to it and gave it; see `Launcher.confinement`."""
    reach: str = ""
    """Digest of what its builds reach and may do; see `Launcher.reach`. Empty: of an earlier version."""


@dataclass(frozen=True, slots=True)
class SlotFiles:
    """The directory of a slot.

    Args:
        home: BKPOOL_HOME.
        slot: Which slot.
    """

    home: Path
    slot: Slot

    @property
    def directory(self) -> Path:
        """Everything of the slot except its log and its sockets."""
        return slots_directory(self.home) / self.slot.namespace / self.slot.pool / str(self.slot.number)

    @property
    def root(self) -> Path:
        """Where buildkitd keeps the cache."""
        return self.directory / "root"

    @property
    def scratch(self) -> Path:
        """The TMPDIR of buildkitd. What a killed one leaves here is removed with the cache, or before."""
        return self.root / "tmp"

    @property
    def empty_home(self) -> Path:
        """The HOME of buildkitd. It is empty, so no credential of the host is found in it."""
        return self.directory / "home"

    @property
    def runc_wrapper(self) -> Path:
        """The program that buildkitd runs instead of runc."""
        return self.directory / "runc"

    @property
    def cgroups(self) -> Path:
        """The record of the slot's cgroups, while it has any."""
        return self.directory / "cgroups.json"

    @property
    def config(self) -> Path:
        """The configuration of the last start."""
        return self.directory / "buildkitd.toml"

    @property
    def log(self) -> Path:
        """The log since its last start. The log of the run before is beside it, with the suffix .1.

        Once it was too large, its earlier part is beside it, too (`slot_log`).
        """
        return self.home / "logs" / f"{self.slot.namespace}.{self.slot.worker.name}.log"

    def read_cache(self) -> CacheRecord | None:
        """The record of the cache; None if there is no cache. Without a readable record its state is `wiping`."""
        data = _read(self._cache)
        try:
            return CacheRecord(CacheState(data["state"]), data["owner"])
        except (KeyError, ValueError):
            return CacheRecord(CacheState.WIPING) if self.root.exists() or self._cache.exists() else None

    def write_cache(self, record: CacheRecord) -> None:
        """Writes durably who owns the cache.

        Raises:
            HostFault: It cannot be written.
        """
        _write(self._cache, asdict(record))

    def read_daemon(self) -> DaemonRecord | None:
        """The record of the daemon; None if there is none, or if it cannot be read."""
        try:
            return DaemonRecord(**_read(self._daemon))
        except TypeError:
            return None

    def write_daemon(self, record: DaemonRecord) -> None:
        """Writes durably which daemon is started here.

        Raises:
            HostFault: It cannot be written.
        """
        _write(self._daemon, asdict(record))

    def forget_daemon(self) -> None:
        """Removes the record of a daemon that has ended."""
        with as_host_fault(self._daemon):
            self._daemon.unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Writes buildkitd's configuration."""
        with as_host_fault(self.config):
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.config.write_text(text)

    def write_runc_wrapper(self, script: str) -> None:
        """Writes the program that buildkitd runs instead of runc. Nobody may change it."""
        with as_host_fault(self.runc_wrapper):
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.runc_wrapper.unlink(missing_ok=True)
            self.runc_wrapper.touch(mode=0o500, exist_ok=False)
            self.runc_wrapper.chmod(0o700)
            self.runc_wrapper.write_text(script)
            self.runc_wrapper.chmod(0o500)

    def rotate_log(self) -> None:
        """Begins a new log and keeps the one before."""
        with as_host_fault(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                self.log.replace(self._older_log)
            slot_log.earlier_part(self.log).unlink(missing_ok=True)

    def set_root_aside(self) -> list[Path]:
        """Renames the cache, so that nothing uses it any more. Returns all directories that must be removed."""
        if self.root.exists():
            with as_host_fault(self.root):
                self.root.rename(self.directory / f"wiped-{secrets.token_hex(4)}")
        return sorted(self.directory.glob("wiped-*"))

    def make_scratch(self) -> None:
        """Makes an empty temporary directory, and removes what an earlier daemon has left in it."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        with as_host_fault(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True, mode=0o700)

    def make_empty_home(self) -> None:
        """Makes an empty home directory, and removes what an earlier daemon has left in it."""
        shutil.rmtree(self.empty_home, ignore_errors=True)
        with as_host_fault(self.empty_home):
            self.empty_home.mkdir(parents=True, mode=0o700)

    def remove(self) -> None:
        """Removes the logs and the directory of a slot without a cache, and directories above that are empty then.

        buildkitd logs commands and errors of builds, which belong to the tenant like the cache.
        """
        for log in (self.log, slot_log.earlier_part(self.log), self._older_log):
            with as_host_fault(log):
                log.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            self.directory.parent.rmdir()
            self.directory.parent.parent.rmdir()

    @property
    def _older_log(self) -> Path:
        return self.log.with_suffix(".log.1")

    @property
    def _cache(self) -> Path:
        return self.directory / "cache.json"

    @property
    def _daemon(self) -> Path:
        return self.directory / "process.json"


def slots_directory(home: Path) -> Path:
    """The directory of all slots."""
    return home / "slots"


def slots_on_disk(home: Path) -> Iterator[Slot]:
    """The slots that have a directory. Anything else in there is ignored."""
    for directory in slots_directory(home).glob("*/*/*"):
        namespace, pool, number = directory.parts[-3:]
        try:
            check_name(namespace, field="namespace")
            check_name(pool, field="pool")
        except InvalidInput:
            continue
        if number.isascii() and number.isdigit() and str(int(number)) == number:
            yield Slot(namespace, pool, int(number))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write(path: Path, data: dict[str, Any]) -> None:
    """Replaces a file. After a crash, even of the machine, it is either the old or the new one."""
    fresh = path.with_suffix(".new")
    with as_host_fault(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with fresh.open("w") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def as_host_fault(path: Path) -> Iterator[None]:
    """Turns an OSError about a path that is written into a HostFault, which is the failure of one worker."""
    try:
        yield
    except OSError as error:
        if is_lack_of_descriptors(error):
            raise too_many_open_files(f"{path} cannot be written") from None
        if is_full(error):
            raise disk_full(path, quota=error.errno == errno.EDQUOT) from None
        raise HostFault(
            f"{path} cannot be written: {error.strerror}",
            hint="Make the directory writable for this user.",
            code="Permission",
        ) from None
