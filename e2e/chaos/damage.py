"""Carries out faults on the process backend, and finds what is left over at the end.

It kills only what belongs to the appliance of this run, by process id. schedule.py decides when something happens,
and history.py what must hold afterwards.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from chaos.schedule import Fault

from bkpool.home.runtime_directory import default_directory, home_digest
from harness import Appliance, alive, eventually

DRAINED = 60.0
"""Seconds until an appliance must have ended after SIGTERM. Its builds take 3 s, and its workers are stopped for 5 s
at most."""


class Damage(Protocol):
    """Breaks things on a backend, and finds what must not be left there."""

    def workers(self) -> dict[str, Any]:
        """Returns what runs buildkitd now, by the worker's name."""

    def do(self, fault: Fault, victim: str) -> Callable[[], None]:
        """Carries out a fault. Returns the function that undoes it."""

    def left_over(self) -> Iterator[str]:
        """Yields what must not exist after every lease is released."""

    def left_behind(self) -> Iterator[str]:
        """Ends the appliance. Yields what must not exist afterwards."""


def victim(fault: Fault, workers: dict[str, Any]) -> str | None:
    """Returns the worker that a fault affects: its name, empty for all workers, None if there is no worker."""
    if fault.kind not in {"kill-worker", "stop-worker", "delete-pod"}:
        return ""
    names = sorted(workers)
    return names[fault.victim % len(names)] if names else None


class ProcessDamage:
    """The process backend: an appliance and its buildkitd processes."""

    def __init__(self, appliance: Appliance, most: int) -> None:
        self._appliance = appliance
        self._most = most

    def workers(self) -> dict[str, int]:
        found = {}
        for pid in self._appliance.workers():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text()
                if slot := re.search(r"/slots/[^/]+/([^/]+)/(\d+)/", command):
                    found[f"{slot[1]}-worker-{slot[2]}"] = pid
        return found

    def do(self, fault: Fault, victim: str) -> Callable[[], None]:
        if fault.lane == "appliance":
            end_appliance(self._appliance, fault.kind)
            return self._appliance.up
        pid = self.workers().get(victim)
        if pid is None:  # it has just ended for another reason
            return lambda: None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if fault.kind == "kill-worker" else signal.SIGSTOP)
        return lambda: resume(pid) if fault.kind == "stop-worker" else None

    def left_over(self) -> Iterator[str]:
        slots = self._appliance.home / "slots"
        for directory in slots.glob("*/*/*"):
            if not directory.name.isdigit() or int(directory.name) >= self._most:
                yield f"the directory {directory.relative_to(self._appliance.home)}"
        yield from (f"the cache {path.name}, which was set aside to be wiped" for path in slots.rglob("wiped-*"))
        known = {member["name"] for member in self._appliance.pool()["members"]}
        yield from (f"a buildkitd of {name}, which is no worker" for name in self.workers().keys() - known)
        yield from (f"a second appliance, process {pid}" for pid in _appliances(self._appliance.home)[1:])

    def left_behind(self) -> Iterator[str]:
        home = self._appliance.home
        sockets = default_directory(home, self._appliance.env)
        self._appliance.down("--now").ok()
        yield from (f"process {pid} of a worker" for pid in self._appliance.daemons())
        yield from (f"the appliance, process {pid}" for pid in _appliances(home))
        yield from (f"the mount {line.split()[4]}" for line in _mounts() if str(home) in line)
        name = f"bkpool-{home_digest(home)}"
        yield from (f"the cgroup {top}/{name}" for top, names, _ in os.walk("/sys/fs/cgroup") if name in names)
        if sockets.exists():
            yield f"the directory {sockets}"
        self._appliance.down("--purge").ok()
        yield from (f"{path.name} in the home after --purge" for path in home.iterdir() if path.name != "lock")


def end_appliance(appliance: Appliance, how: str) -> None:
    """Kills the appliance with kill -9, or sends SIGTERM and waits until its drain has ended."""
    if how == "kill-appliance":
        appliance.kill()
    else:
        pid = appliance.described["pid"]
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not alive(pid), "the appliance has drained and ended after SIGTERM", timeout=DRAINED)


def resume(pid: int) -> None:
    """Sends SIGCONT, if the process still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def wrong_in_log(appliance: Appliance) -> Iterator[str]:
    """Yields what no log may contain: secrets and unexpected exceptions."""
    yield from (f"a secret in a log: {found}" for found in appliance.leaked())
    for line in appliance.log.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if "exception" in record:
                last = record["exception"].strip().splitlines()[-1]
                yield f"an exception in the log: {record.get('event')}: {last}"
            continue
        if line.startswith("Traceback"):
            yield "a traceback in the log"


def _appliances(home: Path) -> list[int]:
    """Returns the processes that run `bkpool up` for this home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"BKPOOL_HOME={home}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if ours and b"up" in (entry / "cmdline").read_bytes().split(b"\0") and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()
