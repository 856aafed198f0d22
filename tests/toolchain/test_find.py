from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault
from bkpool.toolchain import Tool, Toolchain, default_cache, versions
from bkpool.toolchain.table import RELEASES, release_of

OLD_RUNC = "runc version 1.1.5+ds1\nlibseccomp: 2.5.4"
NEW_RUNC = "runc version 1.3.3\nlibseccomp: 2.5.4"


def test_a_tool_on_path_is_used_if_it_is_new_enough(tmp_path, put):
    where = put("runc", NEW_RUNC)
    found = Toolchain(tmp_path / "cache", search_path=str(where)).locate(Tool.RUNC)
    assert (found.path, str(found.version), found.origin) == (where / "runc", "1.3.3", "PATH")


def test_an_old_tool_is_skipped_for_a_newer_one_later_on_path(tmp_path, put):
    path = f"{put('runc', OLD_RUNC, 'old')}{os.pathsep}{put('runc', NEW_RUNC, 'new')}"
    chain = Toolchain(tmp_path / "cache", search_path=path)
    assert chain.find(Tool.RUNC) == tmp_path / "new" / "runc"
    (old,) = chain.rejected(Tool.RUNC)
    assert "1.1.5" in old.problem
    assert "CVE-2025-31133" in old.problem


@pytest.mark.parametrize(
    ("tool", "output"),
    [
        (Tool.RUNC, "runc version 1.5.2"),  # built without seccomp
        (Tool.RUNC, "crun version 9.9.9\nlibseccomp: 2.5.4"),
        (Tool.BUILDX, "buildx 9.9.9"),
        (Tool.BUILDX, "github.com/docker/buildx v0.40.0-12-g1234abc.m 1234abc"),
        (Tool.BUILDKITD, "buildkitd github.com/moby/buildkit v0.40.0-dev 1234abc"),
        (Tool.BUILDKITD, "buildkitd github.com/moby/buildkit 0.0.0+unknown"),
        (Tool.BUILDKITD, ""),
    ],
)
def test_another_program_a_development_build_or_one_without_seccomp_is_not_used(tmp_path, put, tool, output):
    chain = Toolchain(tmp_path / "cache", search_path=str(put(tool, output)))
    assert chain.find(tool) is None
    assert len(chain.rejected(tool)) == 1


def test_the_buildx_plugin_of_docker_is_found(tmp_path, put, monkeypatch):
    put("docker-buildx", "github.com/docker/buildx v0.29.1 a1b2c3", "cli-plugins")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert Toolchain(tmp_path / "cache").find(Tool.BUILDX) == tmp_path / "cli-plugins" / "docker-buildx"


def test_a_program_that_hangs_is_skipped(tmp_path, put, monkeypatch):
    where = put("runc", "")
    (where / "runc").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(versions, "_VERSION_TIMEOUT", 0.1)
    assert Toolchain(tmp_path / "cache", search_path=str(where)).find(Tool.RUNC) is None


def test_a_program_that_cannot_run_and_a_relative_directory_are_skipped(tmp_path, put, monkeypatch):
    where = put("runc", NEW_RUNC)
    monkeypatch.chdir(tmp_path)
    assert Toolchain(tmp_path / "cache", search_path="path").find(Tool.RUNC) is None
    (where / "runc").write_bytes(b"\x7fELF of another machine")
    chain = Toolchain(tmp_path / "cache", search_path=str(where))
    assert chain.find(Tool.RUNC) is None
    assert "cannot be run" in chain.rejected(Tool.RUNC)[0].problem


def test_the_cache_directory_is_the_first_of_bkpool_cache_xdg_and_home(monkeypatch):
    monkeypatch.setenv("BKPOOL_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    monkeypatch.setenv("HOME", "/three")
    assert default_cache() == Path("/one")
    monkeypatch.delenv("BKPOOL_CACHE")
    assert default_cache() == Path("/two/bkpool")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == Path("/three/.cache/bkpool")


def test_without_a_home_directory_the_error_names_the_variable(monkeypatch):
    for name in ("BKPOOL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    with pytest.raises(HostFault) as caught:
        default_cache()
    assert "BKPOOL_CACHE" in caught.value.hint


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_the_table_and_the_packaged_go_module_pin_the_same_versions(release):
    text = (files("bkpool.toolchain") / "gotools" / "go.mod").read_text()
    for source in release.tools.values():
        assert f"\t{source.package}\n" in text.split("tool (")[1].split(")")[0]
    modules = re.findall(r"^\t(\S+) v(\S+)", text, re.MULTILINE)
    package = next(iter(release.tools.values())).package
    assert [v for module, v in modules if package == module or package.startswith(f"{module}/cmd")] == [
        release.version
    ]


@pytest.mark.parametrize("tool", Tool)
def test_every_tool_has_a_release(tool):
    assert tool in release_of(tool).tools
