"""Carries out faults on the process backend, and finds what is left over at the end.

The appliance runs in the foreground. Its log goes through a pipe that the test reads or does not read, and its home
is a small file system of its own that can be filled.

It kills only what belongs to the appliance of this run, by process id. schedule.py decides when something happens,
and history.py what must hold afterwards.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from chaos.schedule import Fault

from bkpool.home.runtime_directory import default_directory, home_digest
from harness import Answer, Appliance, alive, eventually

UP = 60.0
"""Seconds until an appliance must be up. They are longer than a disk is full."""
HOME_SIZE = "512m"
"""Size of the file system of the home: enough for three workers and their builds, and soon full."""
SMALLEST_PIPE = 4096
"""Bytes in the pipe of the log: the least that Linux allows. It is full after a few lines that nobody reads."""
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
    if fault.kind not in {"kill-worker", "stop-worker", "hang-worker", "delete-pod"}:
        return ""
    names = sorted(workers)
    return names[fault.victim % len(names)] if names else None


class ForegroundAppliance(Appliance):
    """An appliance that runs in the foreground, so that its log goes through a pipe.

    `reads_log` is cleared while nobody reads the pipe. What was read is in `log_file`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads_log = threading.Event()
        self.reads_log.set()
        self.log_file = self.base / "appliance.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def up(self, *options: str) -> dict[str, Any]:
        """Starts the appliance and waits until it is up. While its disk is full it is started again and again."""
        deadline = time.monotonic() + UP
        while not self._started(options):
            if time.monotonic() > deadline:
                raise AssertionError(f"the appliance does not start: {self.log[-2000:]}")
        return self.described

    def _started(self, options: tuple[str, ...]) -> bool:
        argv = [*self.program, "up", *self.world.options(), *self.addresses, *options]
        process = subprocess.Popen(argv, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
        threading.Thread(target=self._pump, args=(process.stderr,), daemon=True).start()
        eventually(lambda: process.poll() is not None or self._is_up(process.pid), "the appliance is up or has ended")
        self._process = process
        return process.returncode is None

    def _is_up(self, pid: int) -> bool:
        with suppress(OSError, ValueError, KeyError):
            return self.described["pid"] == pid
        return False

    def _pump(self, pipe: IO[bytes]) -> None:
        with pipe, self.log_file.open("ab", buffering=0) as file:
            while chunk := os.read(pipe.fileno(), SMALLEST_PIPE):
                file.write(chunk)
                self.reads_log.wait()

    def down(self, *options: str) -> Answer:
        self.reads_log.set()
        answer = super().down(*options)
        if self._process is not None:
            self._process.wait(DRAINED)  # it is our child: without this it stays as a zombie
        return answer


@contextmanager
def small_home(base: Path) -> Iterator[None]:
    """Makes the home of the appliance below `base` a file system of its own, which can be filled."""
    home = base / "home"
    home.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,size={HOME_SIZE}", "chaos", str(home)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=False)


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
        match fault.kind:
            case "full-disk":
                return self._fill_disk()
            case "unread-log" if isinstance(self._appliance, ForegroundAppliance):
                self._appliance.reads_log.clear()
                return self._appliance.reads_log.set
            case "remove-runtime":
                shutil.rmtree(default_directory(self._appliance.home, self._appliance.env), ignore_errors=True)
                return lambda: None
            case _:
                return self._signal(fault.kind, victim)

    def _signal(self, kind: str, victim: str) -> Callable[[], None]:
        pid = self.workers().get(victim)
        if pid is None:  # it has just ended for another reason
            return lambda: None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kind == "kill-worker" else signal.SIGSTOP)
        return lambda: None if kind == "kill-worker" else resume(pid)

    def _fill_disk(self) -> Callable[[], None]:
        """Fills the home's file system to the last byte, and again and again what is freed meanwhile."""
        filler = self._appliance.home / "filler"
        over = threading.Event()

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while not over.wait(0.05):
                    with suppress(OSError):
                        while file.write(b"\0" * (1 << 20)):
                            pass

        thread = threading.Thread(target=fill)
        thread.start()

        def mend() -> None:
            over.set()
            thread.join()
            filler.unlink()

        return mend

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
        mounts = (line.split()[4] for line in _mounts() if str(home) in line)
        yield from (f"the mount {mount}" for mount in mounts if mount != str(home))
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
