"""Checks the kernel and the rights of the user: what buildkitd and runc need, as root or rootless.

It only reads. It does not mount, unshare or change anything.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from bkpool.toolchain import packages
from bkpool.toolchain.host import Check, HostFacts
from bkpool.toolchain.table import ARCHITECTURES

_CAP_SYS_ADMIN = 21  # linux/capability.h
_SUBORDINATES = 65536  # ids that an image may use: 16 bits, as every distribution assigns
_NO_UPPER = {"overlay", "nfs", "nfs4", "vfat"}
"""Filesystems that cannot hold the upper layer of overlayfs (filesystems/overlayfs.rst in the kernel)."""

# Names in binfmt_misc, from qemu-binfmt-conf.sh of qemu, to platforms of BuildKit.
_EMULATED = {
    "qemu-aarch64": "linux/arm64",
    "qemu-arm": "linux/arm/v7",
    "qemu-i386": "linux/386",
    "qemu-loongarch64": "linux/loong64",
    "qemu-ppc64le": "linux/ppc64le",
    "qemu-riscv64": "linux/riscv64",
    "qemu-s390x": "linux/s390x",
    "qemu-x86_64": "linux/amd64",
}


def checks(host: HostFacts, home: Path) -> Iterator[Check]:
    """The findings about kernel and rights, for the user of `host` and state kept in `home`."""
    if host.uid == 0:
        yield _privileges(host)
        yield _cgroups(host)
    else:
        yield _namespaces(host)
        yield _id_mappers(host)
        yield from (_subordinates(host, file) for file in ("subuid", "subgid"))
    yield _overlay(host, home)
    yield _seccomp(host)
    yield _platforms(host)


def _privileges(host: HostFacts) -> Check:
    status = dict(line.split(":", 1) for line in (host.read("proc/self/status") or "").splitlines() if ":" in line)
    if int(status.get("CapEff", "0").strip(), 16) >> _CAP_SYS_ADMIN & 1:
        return Check("privileges", True, "root, with CAP_SYS_ADMIN")
    return Check(
        "privileges",
        False,
        "root without CAP_SYS_ADMIN: runc cannot mount anything",
        "Give the container --privileged, or run bkpool as an ordinary user.",
    )


def _cgroups(host: HostFacts) -> Check:
    top = host.root / "sys/fs/cgroup"
    unified = (top / "cgroup.controllers").exists()
    needed = [top] if unified else [top / "memory", top / "pids"]
    closed = [str(path) for path in needed if not os.access(path, os.W_OK)]
    if not closed:
        return Check("cgroups", True, f"version {2 if unified else 1}, writable")
    return Check(
        "cgroups",
        False,
        f"{', '.join(closed)} cannot be written: runc cannot start a container",
        "Run as root: mount -o remount,rw /sys/fs/cgroup; in a container give it --privileged.",
    )


def _namespaces(host: HostFacts) -> Check:
    name = "user namespaces"
    if not os.path.lexists(host.root / "proc/self/ns/user"):
        return Check(name, False, "the kernel has none", "Use a kernel with CONFIG_USER_NS, or run bkpool as root.")
    for path, refused in (("user/max_user_namespaces", 0), ("kernel/unprivileged_userns_clone", 0)):
        if host.number(f"proc/sys/{path}") == refused:
            key = path.replace("/", ".")
            fix = f"Run as root: sysctl -w {key}={1 if 'clone' in key else 28633}"
            return Check(name, False, f"not for ordinary users ({key} is 0)", fix)
    restricted = "kernel.apparmor_restrict_unprivileged_userns"
    if host.number(f"proc/sys/{restricted.replace('.', '/')}") == 1:
        detail = "AppArmor allows them only for programs with a profile"
        return Check(name, None, detail, f"Run as root: sysctl -w {restricted}=0, or give rootlesskit a profile.")
    return Check(name, True, "available to ordinary users")


def _id_mappers(host: HostFacts) -> Check:
    found = {name: shutil.which(name, path=host.search_path) for name in ("newuidmap", "newgidmap")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        return Check("id mapping", False, f"{' and '.join(missing)} not found", packages.install("newuidmap"))
    denied = [path for path in found.values() if path and not _may_map(Path(path))]
    if denied:
        fix = f"Run as root: chmod u+s {' '.join(denied)}"
        return Check("id mapping", False, f"{' and '.join(denied)}: neither setuid nor with capabilities", fix)
    return Check("id mapping", True, str(found["newuidmap"]))


def _may_map(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_ISUID) or "security.capability" in os.listxattr(path)
    except OSError:
        return False


def _subordinates(host: HostFacts, file: str) -> Check:
    lines = [line.strip().split(":") for line in (host.read(f"etc/{file}") or "").splitlines()]
    counts = [line[2] for line in lines if len(line) == 3 and line[0] in {host.user, str(host.uid)}]  # noqa: PLR2004 - subuid(5)
    most = max((int(count) for count in counts if count.isdecimal()), default=0)
    if most >= _SUBORDINATES:
        return Check(file, True, f"{most} ids for {host.user}")
    option = f"--add-{file}s"
    return Check(
        file,
        False,
        f"/etc/{file} gives {host.user} {most or 'no'} ids, but an image needs {_SUBORDINATES}",
        f"Run as root: usermod {option} 100000-165535 {host.user}  (a range that no other user has)",
    )


def _overlay(host: HostFacts, home: Path) -> Check:
    slow = "layers are copied, which is slow and needs disk space"
    if "\toverlay" not in (host.read("proc/filesystems") or ""):
        return Check("overlayfs", None, f"not loaded: {slow}", "Run as root: modprobe overlay")
    kind = _filesystem(host, home)
    if kind in _NO_UPPER:
        fix = "Set BKPOOL_HOME to a directory on ext4, xfs or btrfs."
        return Check("overlayfs", None, f"{home} is on {kind}, which overlayfs cannot write to: {slow}", fix)
    return Check("overlayfs", True, f"available; {home} is on {kind}" if kind else "available")


def _filesystem(host: HostFacts, path: Path) -> str:
    """The type of the filesystem of a path, which need not exist (proc(5), mountinfo)."""
    longest, kind = -1, ""
    for line in (host.read("proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if path.resolve().is_relative_to(point) and len(point) >= longest:  # a later mount covers an earlier one
            longest, kind = len(point), after.split()[0]
    return kind


def _seccomp(host: HostFacts) -> Check:
    if host.read("proc/sys/kernel/seccomp/actions_avail"):
        return Check("seccomp", True, "filters available")
    return Check("seccomp", None, "the kernel has no seccomp filters: builds run without them", "Use another kernel.")


def _platforms(host: HostFacts) -> Check:
    native = f"linux/{ARCHITECTURES.get(host.machine, host.machine)}"
    registered = {name: host.read(f"proc/sys/fs/binfmt_misc/{name}") or "" for name in _EMULATED}
    enabled = {name: text for name, text in registered.items() if text.startswith("enabled")}
    # Without the flag F the kernel looks for the emulator in the root of the build, where it does not exist.
    emulated = [_EMULATED[name] for name, text in enabled.items() if "F" in _flags(text)]
    text = ", ".join([f"{native} (native)", *(f"{platform} (emulated)" for platform in emulated)])
    if len(emulated) < len(enabled):
        without_flag = ", ".join(name for name, text in enabled.items() if "F" not in _flags(text))
        return Check("platforms", None, f"{text}; {without_flag} does not have the flag F", packages.install("qemu"))
    return Check("platforms", True, text if emulated else f"{text}; others can be built only without RUN")


def _flags(text: str) -> str:
    return next((line.removeprefix("flags:") for line in text.splitlines() if line.startswith("flags:")), "")
