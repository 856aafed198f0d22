"""Puts buildkitd into namespaces, so that nothing that it started outlives it.

Each buildkitd has its own PID and mount namespace. When the first process in there ends, the kernel ends all build
containers, and no mount is seen outside. Without that, build containers survive a killed buildkitd, and its overlays
stay mounted. For root, util-linux's unshare makes the namespaces; for an ordinary user, rootlesskit.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bkpool.core.errors import HostFault
from bkpool.toolchain import Tool
from bkpool.workers.processes import environment

_CAP_SYS_ADMIN = 1 << 21  # capabilities(7): to make namespaces and mounts

_USER_NAMESPACES = {"user.max_user_namespaces": 15000, "kernel.unprivileged_userns_clone": 1}
"""Settings that must not be 0, with a value that is enough. The second exists only on Debian before 11."""
_APPARMOR = (
    "kernel.apparmor_restrict_unprivileged_userns"  # Ubuntu since 23.10; a profile may allow rootlesskit all the same
)


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs that a worker needs, as absolute paths."""

    buildkitd: Path
    runc: Path
    rootlesskit: Path | None = None
    """Only ordinary users need it."""

    @classmethod
    def found(cls, find: Callable[[Tool], Path | None]) -> Binaries:
        """The programs that a function such as Toolchain.find finds. The first start reports one that is missing."""
        buildkitd = find(Tool.BUILDKITD) or Path("buildkitd")
        return cls(buildkitd, find(Tool.RUNC) or Path("runc"), find(Tool.ROOTLESSKIT))


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Wraps commands into namespaces, with the program that this user can use.

    Args:
        binaries: Where the programs are.
        environ: Has proxies and certificate paths.
    """

    binaries: Binaries
    environ: Mapping[str, str]

    @property
    def rootless(self) -> bool:
        """Whether this is an ordinary user."""
        return os.geteuid() != 0

    def check(self) -> None:
        """Checks that this user can run workers on this machine.

        Raises:
            HostFault: They cannot. The error names what is missing and how to get it.
        """
        for binary in (self.binaries.buildkitd, self.binaries.runc):
            if not os.access(binary, os.X_OK):
                raise _missing(f"{binary} is not there, or this user may not run it", "Run bkpool doctor.")
        if self.rootless:
            self._check_rootless()
        else:
            self._check_root()

    def wrap(self, command: Sequence[str], state: Path) -> list[str]:
        """The command line that runs a command as root of new namespaces.

        Args:
            command: The program and its arguments.
            state: A directory for rootlesskit's own sockets. It must not exist yet.
        """
        if self.rootless:
            rootlesskit = str(self.binaries.rootlesskit)
            return [rootlesskit, "--net=host", "--pidns", f"--state-dir={state}", *command]
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *command]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of what runs in the namespaces; see `worker_environment`."""
        return environment.worker_environment(self.environ, home, **more)

    def advice(self) -> str:
        """What to try if a worker did not start although nothing is missing; empty if nothing is known."""
        if self.rootless and _sysctl(_APPARMOR) == "1":
            return f"AppArmor may have refused the namespaces; as root: sysctl -w {_APPARMOR}=0"
        return ""

    def _check_root(self) -> None:
        if shutil.which("unshare", path=environment.PATH) is None:
            raise _missing("unshare is not on the PATH", "Install the package util-linux.")
        status = Path("/proc/self/status").read_text()
        capabilities = next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1]
        if not int(capabilities, 16) & _CAP_SYS_ADMIN:
            raise HostFault(
                "root may not mount here (no CAP_SYS_ADMIN): this is an unprivileged container",
                hint="Run the container with --privileged, or run bkpool outside of it or as an ordinary user.",
                code="Permission",
            )

    def _check_rootless(self) -> None:
        rootlesskit = self.binaries.rootlesskit
        if rootlesskit is None or not os.access(rootlesskit, os.X_OK):
            raise _missing(
                "rootlesskit is missing, and an ordinary user cannot run buildkitd without it", "Run bkpool up."
            )
        for program in ("newuidmap", "newgidmap"):
            if shutil.which(program, path=environment.PATH) is None:
                fix = "Install the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora), or run bkpool as root."
                raise _missing(
                    f"{program} is not on the PATH, and an ordinary user cannot run buildkitd without it", fix
                )
        for setting, enough in _USER_NAMESPACES.items():
            if _sysctl(setting) == "0":
                raise HostFault(
                    f"ordinary users cannot make user namespaces on this machine ({setting} is 0)",
                    hint=f"As root: sysctl -w {setting}={enough}; or run bkpool as root.",
                    code="Permission",
                )
        user = pwd.getpwuid(os.geteuid()).pw_name
        for file in (Path("/etc/subuid"), Path("/etc/subgid")):
            if not _has_range(file, user):
                raise HostFault(
                    f"{file} has no range for the user {user}, and an ordinary user cannot run buildkitd without it",
                    hint=f"As root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
                    code="Permission",
                )


def _sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys", name.replace(".", "/")).read_text().strip()
    except OSError:
        return None


def _has_range(file: Path, user: str) -> bool:
    """Whether the user has a range in subuid(5) or subgid(5), or nsswitch.conf(5) names another source of them."""
    with suppress(OSError):
        if "subid:" in Path("/etc/nsswitch.conf").read_text():
            return True
        owners = {line.split(":")[0] for line in file.read_text().splitlines()}
        return bool(owners & {user, str(os.geteuid())})
    return False


def _missing(message: str, hint: str) -> HostFault:
    return HostFault(message, hint=hint, code="ToolMissing")
