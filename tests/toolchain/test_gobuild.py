from __future__ import annotations

import os
import threading

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


def test_a_build_that_hangs_is_ended_with_what_it_has_started(tmp_path, monkeypatch):
    """A compiler that go has started holds the other end of the output for as long as it lives."""
    begun = threading.Event()

    class AfterTheFirstLine(threading.Timer):
        def run(self) -> None:
            begun.wait(60)
            super().run()

    monkeypatch.setattr(gobuild, "_BUILD_TIMEOUT", 0.2)
    monkeypatch.setattr(threading, "Timer", AfterTheFirstLine)
    command = ["/bin/sh", "-c", "sleep 1000 & echo begun >&2; wait"]
    code, lines = gobuild._run(command, tmp_path, dict(os.environ), lambda _text, _part: begun.set())
    assert (code, lines) == (-9, ["begun"])


def test_what_go_keeps_is_in_the_cache_of_bkpool_and_modules_of_the_user_are_read(tmp_path, monkeypatch):
    for name in ("GOCACHE", "GOMODCACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gobuild, "_go_env", lambda *_: [str(tmp_path / "theirs"), "https://proxy.example,direct"])
    release, caches = release_of(Tool.BUILDX), tmp_path / "go"
    alone = gobuild._environment(release, tmp_path, caches)
    assert (alone["GOPATH"], alone["GOMODCACHE"], alone["GOCACHE"]) == (
        str(caches),
        str(caches / "modules"),
        str(caches / "build"),
    )
    assert alone["GOPROXY"] == "https://proxy.example,direct"
    (tmp_path / "theirs/cache/download").mkdir(parents=True)
    warm = gobuild._environment(release, tmp_path, caches)
    assert warm["GOPROXY"] == f"file://{tmp_path}/theirs/cache/download,https://proxy.example,direct"
    monkeypatch.setenv("GOCACHE", "/elsewhere")
    assert gobuild._environment(release, tmp_path, caches)["GOCACHE"] == "/elsewhere"
