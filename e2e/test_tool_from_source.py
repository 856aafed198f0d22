"""A tool is built with Go where its releases cannot be reached. That takes a minute of a processor."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from bkpool.toolchain import Tool, Toolchain
from harness import only_on

NOWHERE = "http://127.0.0.1:9"  # the discard port: a mirror that cannot be reached

pytestmark = only_on("process", "the tools are the same for every backend")


@pytest.mark.network
@pytest.mark.skipif(shutil.which("go") is None, reason="builds a tool with Go, and there is no go on PATH")
def test_without_releases_a_tool_is_built_from_the_module_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("GOFLAGS", "-mod=vendor -tags=nonsense")
    monkeypatch.setenv("GOARCH", "s390x")  # left over from a cross build
    monkeypatch.setenv("GOWORK", str(tmp_path / "go.work"))
    monkeypatch.setenv("GOPATH", str(tmp_path / "gopath"))
    messages = []
    chain = Toolchain(tmp_path, search_path="", mirror=NOWHERE, progress=lambda *step: messages.append(step[1]))
    rootlesskit = chain.ensure(Tool.ROOTLESSKIT)
    assert subprocess.check_output([rootlesskit, "--version"], text=True) == "rootlesskit version 2.3.6\n"
    assert any("cannot be reached" in text for text in messages)
    assert any("building rootlesskit 2.3.6 with go" in text for text in messages)
    assert [path.name for path in (tmp_path / "tools" / "bin").iterdir()] == ["rootlesskit-2.3.6"]
    assert (tmp_path / "go" / "modules").is_dir()
    assert not (tmp_path / "gopath").exists()
    chain.clean()
    assert not (tmp_path / "go").exists()
    assert rootlesskit.exists()
