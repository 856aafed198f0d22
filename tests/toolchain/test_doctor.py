from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from bkpool.core.descriptors import ConnectionShares
from bkpool.home import runtime_directory
from bkpool.toolchain import Toolchain, doctor
from bkpool.toolchain.doctor import DescriptorLoad, HostFacts, checks, worker_faults

USUAL = ConnectionShares(api=4096, gateway_pending=1024, gateway=10_000)
ALL_CAPS = "000001ffffffffff"
FILES = {
    "proc/self/status": f"Name:\tx\nCapEff:\t{ALL_CAPS}\n",
    "proc/self/ns/user": "",
    "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n",
    "proc/filesystems": "nodev\tproc\nnodev\toverlay\n\text4\n",
    "proc/sys/user/max_user_namespaces": "28633\n",
    "proc/sys/kernel/unprivileged_userns_clone": "1\n",
    "proc/sys/kernel/apparmor_restrict_unprivileged_userns": "0\n",
    "proc/sys/kernel/seccomp/actions_avail": "kill_process allow\n",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
    "etc/subuid": "root:1:2\njoe:100000:65536\n",
    "etc/subgid": "1000:100000:65536\n",
    "bin/newuidmap": "",
    "bin/newgidmap": "",
    "bin/pasta": "",
    "bin/nft": "",
    "bin/git": "",
    "dev/net/tun": "",
    "etc/resolv.conf": "nameserver 192.0.2.53\n",
}


@pytest.fixture
def machine(tmp_path):
    """A machine on which everything is well, as a tree of files; a test spoils one thing."""
    root = tmp_path / "machine"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("newuidmap", "newgidmap", "pasta", "nft", "git"):
        (root / "bin" / name).chmod(0o4755)
    return root


@pytest.fixture
def examine(machine, tmp_path, releases, no_go, monkeypatch):
    home = tmp_path / "home"
    chain = Toolchain(tmp_path / "cache", search_path="", mirror=releases.url)
    # What else runs on this machine takes room of its disk between two looks.
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _place: SimpleNamespace(free=10**12))

    def _examine(
        uid: int = 0, ports=None, own_ports=frozenset(), home: Path = home, host_network=False, load=None, **changes
    ):
        host = HostFacts(machine, uid, "joe", "x86_64", str(machine / "bin"), descriptors=(1024, 65_536))
        host = dataclasses.replace(host, **changes)
        found = checks(home, chain, ports or {}, own_ports=own_ports, host_network=host_network, load=load, host=host)
        return {check.name: check for check in found}

    return _examine


@pytest.mark.parametrize("uid", [0, 1000])
def test_on_a_good_machine_no_check_fails(examine, uid):
    found = examine(uid)
    tools = {"buildkitd", "buildx", "runc"} | ({"rootlesskit"} if uid else set())
    assert {name for name, check in found.items() if check.ok is not True} == tools
    assert all("`bkpool up` downloads" in found[tool].detail for tool in tools)
    assert all("go.dev/dl" in found[tool].fix for tool in tools)


@pytest.mark.parametrize(
    ("limits", "ok", "says"),
    [
        ((1024, 1 << 20), True, "1048576 open files, to which `bkpool up` raises the soft limit of 1024"),
        ((1024, -1), True, "1048576 open files"),
        ((1024, 1024), None, "1024 open files"),
    ],
)
def test_the_limit_of_open_files_is_shown(examine, limits, ok, says):
    check = examine(descriptors=limits)["open files"]
    assert check.ok is ok
    assert check.detail.startswith(says)
    assert bool(check.fix) is (ok is None)


@pytest.mark.parametrize(
    ("load", "ok", "says"),
    [
        (
            DescriptorLoad(USUAL),
            True,
            "10000 connections of builds, 1024 that have no lease yet, 4096 of the API and, beside all these, about ",
        ),
        (DescriptorLoad(USUAL, workers=672), True, "65536 open files suffice for 10000"),
        (DescriptorLoad(USUAL, workers=673), None, "the pools may have 673 workers, so there are too few worker pro"),
        (DescriptorLoad(USUAL, workers=10, limit=1024), True, "1024 open files suffice for 192 connections of"),
        (DescriptorLoad(USUAL, workers=40, limit=1024), None, "about 32 worker processes; the pools may have 40"),
        (
            DescriptorLoad(ConnectionShares(100, 100, 5), workers=6),
            None,
            "6 workers, so there are too few connections of builds",
        ),
    ],
)
def test_the_budget_of_open_files_is_shown(examine, load, ok, says):
    check = examine(load=load)["budget of files"]
    assert check.ok is ok
    assert says in check.detail
    assert ("scaling.max" in check.fix) is (ok is None)


def test_an_installed_tool_is_shown_with_version_and_origin(tmp_path, put):
    chain = Toolchain(tmp_path, search_path=str(put("runc", "runc version 1.4.0\nlibseccomp: 2.5.4")))
    found = {check.name: check for check in checks(tmp_path, chain, {})}
    assert found["runc"].ok
    assert found["runc"].detail == f"1.4.0 (PATH: {tmp_path}/path/runc)"


def test_a_tool_on_path_that_is_too_old_is_shown_with_the_reason(tmp_path, put):
    chain = Toolchain(tmp_path, search_path=str(put("runc", "runc version 1.1.5\nlibseccomp: 2.5.4")))
    found = {check.name: check for check in checks(tmp_path, chain, {})}
    assert "1.1.5: a build can break out" in found["runc"].detail


@pytest.mark.parametrize(
    ("uid", "path", "text", "name", "ok", "fix"),
    [
        (0, "proc/self/status", "CapEff:\t00000000a80425fb\n", "privileges", False, "--privileged"),
        (0, "proc/self/status", None, "privileges", False, "--privileged"),
        (0, "sys/fs/cgroup/cgroup.controllers", None, "cgroups", False, "remount,rw"),
        (0, "proc/filesystems", "\text4\n", "overlayfs", None, "modprobe overlay"),
        (
            0,
            "proc/self/mountinfo",
            "22 1 0:9 / / rw shared:1 - overlay overlay rw\n",
            "overlayfs",
            None,
            "BKPOOL_HOME",
        ),
        (0, "proc/sys/kernel/seccomp/actions_avail", None, "seccomp", None, "kernel"),
        (0, "bin/git", None, "git", None, "Install git"),
        (0, "etc/resolv.conf", None, "name servers", False, "Make it"),
        (1000, "proc/self/ns/user", None, "user namespaces", False, "CONFIG_USER_NS"),
        (
            1000,
            "proc/sys/user/max_user_namespaces",
            "0\n",
            "user namespaces",
            False,
            "user.max_user_namespaces=28633",
        ),
        (1000, "proc/sys/kernel/unprivileged_userns_clone", "0\n", "user namespaces", False, "userns_clone=1"),
        (1000, "proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n", "user namespaces", None, "userns=0"),
        (1000, "bin/newgidmap", None, "id mapping", False, "uidmap"),
        (1000, "etc/subuid", "jo:100000:65536\n", "subuid", False, "usermod --add-subuids 100000-165535 joe"),
        (1000, "etc/subgid", "joe:100000:1000\n", "subgid", False, "usermod --add-subgids 100000-165535 joe"),
        (1000, "etc/subgid", "joe:nonsense\njoe:1:many\n", "subgid", False, "usermod"),
    ],
)
def test_each_missing_thing_is_one_finding_with_a_fix(examine, machine, uid, path, text, name, ok, fix):
    before = examine(uid)
    (machine / path).unlink()
    if text is not None:
        (machine / path).write_text(text)
    found = examine(uid)
    assert found[name].ok is ok
    assert fix in found[name].fix
    assert {n: c for n, c in found.items() if n != name} == {n: c for n, c in before.items() if n != name}


def test_id_mappers_that_lost_their_setuid_bit_are_named(examine, machine):
    (machine / "bin" / "newuidmap").chmod(0o755)
    check = examine(1000)["id mapping"]
    assert (check.ok, check.fix) == (False, f"Run as root: chmod u+s {machine}/bin/newuidmap")


def test_cgroups_of_version_1_are_recognised(examine, machine):
    (machine / "sys/fs/cgroup/cgroup.controllers").unlink()
    (machine / "sys/fs/cgroup/memory").mkdir()
    (machine / "sys/fs/cgroup/pids").mkdir()
    assert examine()["cgroups"].detail == "version 1, writable"


def test_a_network_of_the_machine_is_not_called_one_of_each_worker(examine):
    assert examine()["network"].detail.startswith("each worker process has its own")
    check = examine(host_network=True)["network"]
    assert (check.ok, "--host-network" in check.detail, "--no-host-network" in check.fix) == (None, True, True)


def test_a_device_that_is_missing_and_one_of_root_have_different_fixes(examine, machine, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("tun"))
    assert examine()["network"].fix == f"Run `chmod 666 {machine}/dev/net/tun` as root."
    (machine / "dev/net/tun").unlink()
    check = examine()["network"]
    assert (check.ok, check.detail.startswith("there is no ")) == (None, True)


@pytest.mark.parametrize(
    ("script", "ok", "detail"),
    [
        (None, True, "there is no docker"),
        ("echo github.com/docker/buildx v0.38.2", True, "github.com/docker/buildx v0.38.2"),
        ("echo unknown command >&2; exit 1", None, "/bin/docker has no buildx"),
    ],
)
def test_docker_is_asked_for_its_buildx(examine, machine, script, ok, detail):
    if script:
        (machine / "bin/docker").write_text(f"#!/bin/sh\n{script}\n")
        (machine / "bin/docker").chmod(0o755)
    check = examine()["docker buildx"]
    assert (check.ok, detail in check.detail, bool(check.fix)) == (ok, True, ok is None)


@pytest.mark.parametrize(
    ("uid", "spoiled", "names"),
    [
        (0, (), []),
        (0, ("proc/self/status",), ["privileges"]),
        (0, ("proc/self/status", "etc/resolv.conf"), ["privileges", "name servers"]),
        (0, ("sys/fs/cgroup/cgroup.controllers", "bin/git"), []),
        (1000, ("bin/newuidmap", "etc/subgid"), ["id mapping", "subgid"]),
    ],
)
def test_what_keeps_every_worker_from_starting(machine, tmp_path, uid, spoiled, names):
    for path in spoiled:
        (machine / path).unlink()
    host = HostFacts(machine, uid, "joe", "x86_64", str(machine / "bin"))
    assert [check.name for check in worker_faults(tmp_path / "home", host=host)] == names


def test_without_a_network_of_its_own_a_worker_needs_no_resolv_conf(machine, tmp_path):
    (machine / "etc/resolv.conf").unlink()
    host = HostFacts(machine, 0, "joe", "x86_64", str(machine / "bin"))
    assert worker_faults(tmp_path / "home", host=host, host_network=True) == []
    (machine / "dev/net/tun").unlink()
    assert worker_faults(tmp_path / "home", host=host) == []


def test_only_platforms_that_can_run_are_listed(examine, machine):
    assert "linux/amd64 (native)" in examine()["platforms"].detail
    registered = machine / "proc/sys/fs/binfmt_misc"
    registered.mkdir(parents=True)
    (registered / "qemu-aarch64").write_text("enabled\ninterpreter /usr/bin/qemu-aarch64-static\nflags: OCF\n")
    (registered / "qemu-s390x").write_text("disabled\ninterpreter /usr/bin/qemu-s390x-static\nflags: OCF\n")
    check = examine()["platforms"]
    assert (check.ok, check.detail) == (True, "linux/amd64 (native), linux/arm64 (emulated)")
    (registered / "qemu-riscv64").write_text("enabled\ninterpreter /usr/bin/qemu-riscv64\nflags: OC\n")
    check = examine()["platforms"]
    assert check.ok is None
    assert "qemu-riscv64 does not have the flag F" in check.detail


def test_a_port_is_free_or_ours_or_used_by_another(examine):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = examine(ports={"API": port})[f"port {port}"]
        assert (check.ok, check.detail) == (False, "API: used by another program")
        assert f":{port}" in check.fix
        assert examine(ports={"API": port}, own_ports={port})[f"port {port}"].detail == "API: used by this bkpool"
    assert examine(ports={"API": port})[f"port {port}"].detail == "API: free"


def test_a_home_that_others_can_read_or_own_is_refused(examine, tmp_path):
    assert examine()["home"].detail == f"{tmp_path}/home will be created"
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    assert (examine(os.geteuid())["home"].ok, examine(os.geteuid())["home"].fix) == (False, f"Run: chmod 700 {home}")
    home.chmod(0o700)
    assert examine(os.geteuid())["home"].ok
    assert "chown -R joe" in examine(os.geteuid() + 1)["home"].fix


def test_a_directory_of_sockets_that_somebody_else_made_is_refused(examine, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_directory, "default_directory", lambda *_: tmp_path / "sockets")
    assert (examine()["sockets"].ok, examine()["sockets"].detail) == (True, str(tmp_path / "sockets"))
    (tmp_path / "sockets").symlink_to(tmp_path)
    check = examine()["sockets"]
    assert (check.ok, "Remove it" in check.fix) == (False, True)


def test_an_old_python_is_refused(examine):
    assert examine(python=(3, 10))["python"].ok is False


def test_this_machine_can_be_examined(tmp_path, toolchain):
    assert all(check.detail for check in checks(tmp_path, toolchain, {"API": 8082}))
