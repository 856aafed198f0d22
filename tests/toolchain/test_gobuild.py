from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from bkpool.core.errors import HostFault
from bkpool.toolchain import Tool, Toolchain, gobuild
from bkpool.toolchain.table import release_of

NOWHERE = "http://127.0.0.1:9"  # the discard port: a mirror that cannot be reached


def go_that_says(directory, version: str, policy: str) -> str:
    """A go of another version, as far as `go env` goes; the machine's other programs stay on PATH."""
    directory.mkdir()
    (directory / "go").write_text(f"#!/bin/sh\nprintf '{version}\\n{policy}\\n'\n")
    (directory / "go").chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("version", "policy", "enough"),
    [
        ("go1.26.8", "local", True),
        ("go1.27rc1", "local", True),
        ("go1.99.0 X:nocoverageredesign", "local", True),
        ("devel go1.27-abcdef", "local", True),
        ("go1.21.0", "auto", True),  # fetches the Go that go.mod asks for by itself
        ("go1.26.7", "local", False),
        ("go1.24.4", "path", False),
        ("go1.19.8", "auto", False),
    ],
)
def test_the_hint_for_an_old_go_names_the_version_to_install(tmp_path, monkeypatch, version, policy, enough):
    monkeypatch.setenv("PATH", go_that_says(tmp_path / "go", version, policy))
    fault = gobuild.missing_for(release_of(Tool.BUILDX))
    assert (fault is None) == enough
    if fault:
        assert version.removeprefix("go") in fault.message
        assert f"Go {gobuild.required_go()}" in fault.hint


def test_without_the_headers_of_libseccomp_runc_is_not_built_and_the_hint_has_the_fix(monkeypatch, tmp_path):
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))
    fault = gobuild.missing_for(release_of(Tool.RUNC))
    assert "libseccomp" in fault.message
    assert "libseccomp" in fault.hint.partition("install")[2] or "apk add" in fault.hint


def test_without_a_c_compiler_runc_is_not_built_and_the_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "no-such-compiler" in gobuild.missing_for(release_of(Tool.RUNC)).message
    assert gobuild.missing_for(release_of(Tool.BUILDX)) is None


def test_a_failed_build_shows_the_output_of_go_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMODCACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("GOPROXY", "off")
    chain = Toolchain(tmp_path / "cache", search_path="", mirror=NOWHERE)
    with pytest.raises(HostFault, match="module lookup disabled by GOPROXY=off") as caught:
        chain.ensure(Tool.ROOTLESSKIT)
    assert caught.value.code == "ToolMissing"
    assert list((tmp_path / "cache" / "tools" / "bin").iterdir()) == []


@pytest.mark.network
@pytest.mark.skipif(shutil.which("go") is None, reason="builds a tool with Go, and there is no go on PATH")
def test_without_releases_a_tool_is_built_from_the_module_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("GOFLAGS", "-mod=vendor -tags=nonsense")
    monkeypatch.setenv("GOARCH", "s390x")  # left over from a cross build
    monkeypatch.setenv("GOWORK", str(tmp_path / "go.work"))
    messages = []
    chain = Toolchain(tmp_path, search_path="", mirror=NOWHERE, progress=lambda *step: messages.append(step[1]))
    rootlesskit = chain.ensure(Tool.ROOTLESSKIT)
    assert subprocess.check_output([rootlesskit, "--version"], text=True) == "rootlesskit version 2.3.6\n"
    assert any("cannot be reached" in text for text in messages)
    assert any("building rootlesskit 2.3.6 with go" in text for text in messages)
    assert [path.name for path in (tmp_path / "tools" / "bin").iterdir()] == ["rootlesskit-2.3.6"]
