"""Prepares what a daemon needs (command line, environment, sockets, cgroup) and removes it when the daemon has ended.

It starts no daemon and keeps nothing in memory.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bkpool.core.errors import HostFault, WorkerFailed
from bkpool.core.names import Slot
from bkpool.core.pool import CacheGC, PoolSpec
from bkpool.home import runtime_directory
from bkpool.toolchain.descriptor_limit import free_descriptors, too_many_open_files
from bkpool.workers import config
from bkpool.workers.processes import init_program, process_table, slot_upkeep, socket_directory
from bkpool.workers.processes.cgroup_entry import cgroup_mounts, entering
from bkpool.workers.processes.cgroup_limits import Limits
from bkpool.workers.processes.daemon import MARK, Launch
from bkpool.workers.processes.init_program import InitProgram
from bkpool.workers.processes.runc_wrapper import wrapper
from bkpool.workers.processes.sandbox import Sandbox
from bkpool.workers.processes.slot_cgroups import SlotCgroups
from bkpool.workers.processes.slot_files import SlotFiles, as_host_fault
from bkpool.workers.processes.worker_init import MountSettings
from bkpool.workers.spec_digest import spec_digest
from bkpool.workers.step_log import step_log_environment

_FREE_DESCRIPTORS = 32
"""A start takes some, and the workers that run, the API and the store need some as well."""
_TRY_TIMEOUT = 30  # seconds; a tenth of one is usual


@dataclass(frozen=True, slots=True)
class Removal:
    """What removes a cache."""

    command: Sequence[str]
    environment: Mapping[str, str]


class Launcher:
    """Prepares starts and cleans up after exits, for the slots of one home.

    Args:
        home: BKPOOL_HOME.
        runtime_dirs: For the sockets: the first that can be made is used. The end of a user's session removes one.
        former_dirs: Where earlier runs may have put the sockets of daemons that still run, or left them.
        sandbox: Puts commands into namespaces.
        init: Gives each worker its network.
        gc_defaults: For pools whose spec says nothing about collection (`workers.config`).
    """

    def __init__(
        self,
        home: Path,
        runtime_dirs: Sequence[Path],
        former_dirs: Sequence[Path],
        *,
        sandbox: Sandbox,
        init: InitProgram,
        gc_defaults: CacheGC,
    ) -> None:
        self._runtime_dirs = runtime_dirs
        self._runtime_dir = runtime_dirs[0]
        self._known_dirs = tuple(dict.fromkeys((*runtime_dirs, *former_dirs)))
        self._sandbox = sandbox
        self._init = init
        self._gc_defaults = gc_defaults
        self._digest = runtime_directory.home_digest(home)
        self._cgroups = SlotCgroups(self._digest)

    @property
    def isolation(self) -> str:
        """How the daemons that this launcher prepares are isolated. It changes with what isolates them."""
        return f"{'own' if self._init.makes_network else 'host'} network, own cgroup, no raw sockets"

    def confinement(self, spec: PoolSpec) -> str:
        """A digest of what a spec opens to a daemon and gives it: network, raw sockets, limits, logs, toml.

        It is empty if the spec cannot be used: then no running daemon has it.
        """
        try:
            network = self._init.settings_of(spec)
            limits = Limits.of(spec.resources.buildkit)
            parts: list[object] = [network, limits, bool(spec.security.net_raw)]
            parts.append(config.render(spec, self._gc_defaults))
            if step_log := step_log_environment(spec):  # else the digest is that of earlier versions
                parts.append(step_log)
        except WorkerFailed:
            return ""
        return spec_digest(*parts)

    def reach(self, spec: PoolSpec) -> str:
        """A digest of what builds reach and may do with a spec: network and raw sockets.

        It is empty if the spec cannot be used: then no running daemon has it.
        """
        try:
            return spec_digest(self._init.settings_of(spec), bool(spec.security.net_raw))
        except WorkerFailed:
            return ""

    def prepare(self, files: SlotFiles, spec: PoolSpec) -> Launch:
        """Makes the files and directories for a start, and returns the command.

        Raises:
            HostFault: This machine, or this user on it, lacks something.
            WorkerFailed: The pool's buildkitd.toml has what a worker cannot have.
        """
        if free_descriptors() < _FREE_DESCRIPTORS:
            raise too_many_open_files(f"{files.slot.worker} cannot be started")
        self._sandbox.check()
        socket_directory.check_slot_directory(self._runtime_dirs[0], files.slot)
        self._choose_runtime_dir()
        if files.read_daemon() is not None:  # something of an earlier start may be left
            self.end_all_of(files.slot)
        self.clear(files)
        sockets = self._sockets(files.slot)
        with as_host_fault(sockets):
            sockets.mkdir(mode=0o700)
        files.make_scratch()
        files.make_empty_home()
        # buildkitd makes sockets for ssh-agents in its TMPDIR, so that path must be short: see socket_directory.
        temporary = sockets / slot_upkeep.TEMPORARY
        with as_host_fault(temporary):
            temporary.symlink_to(files.scratch)
        files.write_config(config.render(spec, self._gc_defaults))
        files.rotate_log()
        socket = sockets / "buildkitd.sock"
        binaries = self._sandbox.binaries
        command = [
            str(binaries.buildkitd),
            f"--config={files.config}",
            f"--root={files.root}",
            f"--addr=unix://{socket}",
            f"--otel-socket-path={sockets / 'otel.sock'}",  # the default is one for all daemons of a machine
            "--containerd-worker=false",
            "--oci-worker=true",  # "auto" looks for runc on PATH only
            f"--oci-worker-binary={self._runc(files, spec)}",
            *(["--rootless"] if self._sandbox.rootless else []),
        ]
        for_init = sockets / "init"
        command = [*self._init.command(for_init, spec, self._mounts(files.empty_home)), *command]
        more = {MARK: self._mark(files.slot), "XDG_RUNTIME_DIR": str(sockets), "TMPDIR": str(temporary)}
        more |= step_log_environment(spec)
        environment = self._sandbox.environment(files.empty_home, **more)
        return Launch(
            self._confine(command, files, spec), environment, socket, files.log, self._init.ready_file(for_init)
        )

    def try_network(self) -> None:
        """Starts and ends a program in the network of a worker, to see whether this machine can make one.

        Raises:
            HostFault: It cannot; the message has what the programs said.
        """
        self._sandbox.check()
        self._choose_runtime_dir()
        with tempfile.TemporaryDirectory(prefix="try-", dir=self._runtime_dir) as directory:
            command = self._init.command(Path(directory, "init"), PoolSpec(), self._mounts(Path(directory)))
            wrapped = self._sandbox.wrap([*command, "/bin/sh", "-c", "exit 0"], Path(directory, "rootlesskit"))
            environment = self._sandbox.environment(Path(directory))
            try:
                done = subprocess.run(
                    wrapped, env=environment, capture_output=True, timeout=_TRY_TIMEOUT, check=False
                )
            except subprocess.TimeoutExpired:
                raise HostFault(
                    f"a network for a worker was not complete after {_TRY_TIMEOUT} s: pasta or nft hangs",
                    hint="Run bkpool doctor.",
                ) from None
        if done.returncode != 0:
            output = done.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]
            raise HostFault(
                f"this machine cannot make a network for a worker: {'; '.join(output) or done.returncode}",
                hint=self._sandbox.advice() or "Run bkpool doctor.",
            )

    def ignored_config(self, spec: PoolSpec) -> list[str]:
        """What `prepare` does not take from the pool's own buildkitd.toml."""
        return config.not_taken(spec, self._gc_defaults)

    def clear(self, files: SlotFiles) -> None:
        """Removes what an ended daemon leaves outside of its cache: sockets and cgroups. It may take 0.1 s."""
        for directory in self._directories():
            shutil.rmtree(socket_directory.slot_directory(directory, files.slot), ignore_errors=True)
        self._cgroups.remove(files.cgroups)

    def close(self) -> None:
        """Removes the directories of the sockets that are empty, and the cgroups."""
        self._cgroups.close()
        for directory in self._directories():
            init_program.remove(directory)
            with suppress(OSError):
                directory.rmdir()

    def end_all_but(self, kept: set[Slot]) -> int:
        """Kills everything that was started for other slots of this home. Returns the number of processes.

        Raises:
            WorkerFailed: One has not ended.
            HostFault: `TooManyOpenFiles`.
        """
        spared = {self._mark(slot) for slot in kept}
        return process_table.kill_marked(
            MARK, lambda mark: mark.startswith(f"{self._digest}/") and mark not in spared
        )

    def end_all_of(self, slot: Slot) -> None:
        """Kills what is left of a start that failed, or of an adopted daemon. The errors: see `end_all_but`."""
        process_table.kill_marked(MARK, self._mark(slot).__eq__)

    def removal(self, slot: Slot, directories: Sequence[Path]) -> Removal:
        """What removes directories of a cache. An ordinary user needs a user namespace for that, as for making them.

        Raises:
            HostFault: This user cannot make one.
        """
        command = ["rm", "-rf", "--one-file-system", "--", *map(str, directories)]
        if self._sandbox.rootless:
            self._sandbox.check()
            self._choose_runtime_dir()
            command = self._sandbox.wrap(command, self._sockets(slot))
        # The mark lets the next run of the appliance find it after a crash.
        return Removal(command, self._sandbox.environment(directories[0].parent, **{MARK: self._mark(slot)}))

    def advice(self) -> str:
        """What to try if a worker did not start although nothing is missing; empty if nothing is known."""
        return self._sandbox.advice()

    def _runc(self, files: SlotFiles, spec: PoolSpec) -> Path:
        """The program that starts build steps."""
        runc = self._sandbox.binaries.runc
        if spec.security.net_raw:
            return runc
        files.write_runc_wrapper(wrapper(runc))
        return files.runc_wrapper

    def _mounts(self, home: Path) -> MountSettings | None:
        """What a worker sees differently from the host; None for an ordinary user, whose rootlesskit makes mounts."""
        if self._sandbox.rootless:
            return None
        return {"home": str(home), "cgroups": cgroup_mounts(self._cgroups.hierarchies)}

    def _confine(self, command: Sequence[str], files: SlotFiles, spec: PoolSpec) -> list[str]:
        """The command in namespaces, in the cgroups of its slot."""
        sockets, separate = self._sockets(files.slot), not self._sandbox.rootless
        slots = self._cgroups.make(files.cgroups, _cgroup(files.slot), Limits.of(spec.resources.buildkit))
        wrapped = self._sandbox.wrap(command, sockets / "rootlesskit")
        return entering(wrapped, slots, self._cgroups.oom_score_adj, separate=separate)

    def _directories(self) -> list[Path]:
        """The directories of sockets that are ours at this moment. In /tmp, another user can make the others."""
        return [path for path in self._known_dirs if runtime_directory.is_private(path)]

    def _choose_runtime_dir(self) -> None:
        self._runtime_dir = runtime_directory.first_usable(self._runtime_dirs)

    def _sockets(self, slot: Slot) -> Path:
        return socket_directory.slot_directory(self._runtime_dir, slot)

    def _mark(self, slot: Slot) -> str:
        return f"{self._digest}/{slot.namespace}/{slot.pool}/{slot.number}"


def _cgroup(slot: Slot) -> str:
    return f"{slot.namespace}.{slot.pool}.{slot.number}"  # a name of Kubernetes' has no dot
