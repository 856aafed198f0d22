"""How buildkitd is wrapped, so that nothing it started outlives it.

It runs in a PID and a mount namespace of its own: when the first process in there ends, the kernel ends every build
container with it, and no mount of it is ever seen outside. Without that, build containers survive a killed buildkitd
and its overlays stay mounted. As root util-linux's unshare makes the namespaces, for an ordinary user rootlesskit.
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

_CAP_SYS_ADMIN = 1 << 21  # capabilities(7): to make namespaces and mounts
_CGROUPS = Path("/sys/fs/cgroup")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# runc keeps its state in /run/runc when it is root; on a tmpfs of the daemon's own it ends with the daemon. The shell
# stays as the first process of the namespace: it reaps, and passes on how buildkitd ended.
_AS_ROOT = 'mkdir -p /run/runc && mount -t tmpfs -o mode=700 bkpool /run/runc && "$0" "$@"; exit $?'

_USER_NAMESPACES = {"user.max_user_namespaces": 15000, "kernel.unprivileged_userns_clone": 1}
"""What must not be 0, and a value that is enough. The second one exists on Debian before 11 only."""
_APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"  # Ubuntu from 23.10; a profile may still allow rootlesskit

_PASSED_ON = (
    "PATH",
    "HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    *(name for lower in ("http_proxy", "https_proxy", "no_proxy", "all_proxy") for name in (lower, lower.upper())),
)


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs that a worker needs, as absolute paths."""

    buildkitd: Path
    runc: Path
    rootlesskit: Path | None = None
    """Needed by ordinary users only."""

    @classmethod
    def found(cls, find: Callable[[Tool], Path | None]) -> Binaries:
        """Those that are at hand, by a finder such as Toolchain.find; a missing one is told at the first start."""
        buildkitd = find(Tool.BUILDKITD) or Path("buildkitd")
        return cls(buildkitd, find(Tool.RUNC) or Path("runc"), find(Tool.ROOTLESSKIT))


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Wraps commands into namespaces, by the means that this user has.

    Args:
        binaries: Where the programs are.
        environ: The environment to take PATH, proxies and certificate paths from.
    """

    binaries: Binaries
    environ: Mapping[str, str]

    @property
    def rootless(self) -> bool:
        """Whether this is an ordinary user."""
        return os.geteuid() != 0

    def check(self) -> None:
        """Makes sure that this machine lets this user run workers.

        Raises:
            HostFault: It does not; says what is missing and how to get it.
        """
        for binary in (self.binaries.buildkitd, self.binaries.runc):
            if not os.access(binary, os.X_OK):
                raise _missing(f"{binary} is not there, or may not be run by this user", "Run bkpool doctor.")
        if self.rootless:
            self._check_rootless()
        else:
            self._check_root()

    def wrap(self, command: Sequence[str], state: Path) -> list[str]:
        """The command line that runs this one as root of namespaces of its own.

        Args:
            command: The program and its arguments.
            state: A directory that does not exist yet, for rootlesskit's own sockets.
        """
        if self.rootless:
            rootlesskit = str(self.binaries.rootlesskit)
            return [rootlesskit, "--net=host", "--pidns", f"--state-dir={state}", *command]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [*unshare, "sh", "-c", _AS_ROOT, *command]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a worker: only what it needs to find programs, proxies and certificates, and `more`."""
        passed = {name: self.environ[name] for name in _PASSED_ON if name in self.environ}
        return {"PATH": _PATH, **passed, **more}

    def advice(self) -> str:
        """What to try where a worker did not come up though nothing is missing; empty where there is no guess."""
        if self.rootless and _sysctl(_APPARMOR) == "1":
            return f"AppArmor may have refused the namespaces; as root: sysctl -w {_APPARMOR}=0"
        return ""

    def _check_root(self) -> None:
        for program in ("unshare", "mount"):
            if shutil.which(program, path=self.environment()["PATH"]) is None:
                raise _missing(f"{program} is not on the PATH", "Install the package util-linux.")
        status = Path("/proc/self/status").read_text()
        capabilities = next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1]
        if not int(capabilities, 16) & _CAP_SYS_ADMIN:
            raise HostFault(
                "this root may not mount (no CAP_SYS_ADMIN): it is that of an unprivileged container",
                hint="Run the container with --privileged, or bkpool outside of it or as an ordinary user.",
                code="Permission",
            )

    def _check_rootless(self) -> None:
        rootlesskit = self.binaries.rootlesskit
        if rootlesskit is None or not os.access(rootlesskit, os.X_OK):
            raise _missing(
                "rootlesskit is missing, and an ordinary user can't run buildkitd without it", "Run bkpool up."
            )
        for program in ("newuidmap", "newgidmap"):
            if shutil.which(program, path=self.environment()["PATH"]) is None:
                fix = "Install the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora), or run bkpool as root."
                raise _missing(
                    f"{program} is not on the PATH, and an ordinary user can't run buildkitd without it", fix
                )
        for setting, enough in _USER_NAMESPACES.items():
            if _sysctl(setting) == "0":
                raise HostFault(
                    f"this machine does not let ordinary users make user namespaces ({setting} is 0)",
                    hint=f"As root: sysctl -w {setting}={enough}; or run bkpool as root.",
                    code="Permission",
                )
        user = pwd.getpwuid(os.geteuid()).pw_name
        for file in (Path("/etc/subuid"), Path("/etc/subgid")):
            if not _has_range(file, user):
                raise HostFault(
                    f"{file} has no range for the user {user}, and an ordinary user can't run buildkitd without it",
                    hint=f"As root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
                    code="Permission",
                )


def remove_cgroups(parent: str) -> None:
    """Removes the empty cgroups that build containers leave under `parent` when buildkitd did not end by itself."""
    for root in (_CGROUPS, *_CGROUPS.glob("*/")):
        top = root / parent.lstrip("/")
        folders = [Path(folder) for folder, _, _ in os.walk(top, topdown=False)]
        for folder in (*folders, top.parent):
            with suppress(OSError):  # in use, or gone by itself
                folder.rmdir()


def _sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys", name.replace(".", "/")).read_text().strip()
    except OSError:
        return None


def _has_range(file: Path, user: str) -> bool:
    """Whether subuid(5) or subgid(5) gives the user a range; they may also come from elsewhere (nsswitch.conf(5))."""
    with suppress(OSError):
        if "subid:" in Path("/etc/nsswitch.conf").read_text():
            return True
        owners = {line.split(":")[0] for line in file.read_text().splitlines()}
        return bool(owners & {user, str(os.geteuid())})
    return False


def _missing(message: str, hint: str) -> HostFault:
    return HostFault(message, hint=hint, code="ToolMissing")
