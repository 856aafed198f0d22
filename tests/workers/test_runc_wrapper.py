"""The program that takes CAP_NET_RAW from build steps, with a stand-in for runc and with real builds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bkpool.core.names import Slot
from bkpool.workers.processes.runc_wrapper import wrapper
from bkpool.workers.processes.slot_files import SlotFiles
from support.objects import pool as a_pool

pytestmark = pytest.mark.slow

SLOT = Slot("default", "default", 0)
ORDINARY = ["CAP_CHOWN", "CAP_NET_RAW", "CAP_SETUID"]
SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")


def capabilities(*names: str) -> dict[str, list[str]]:
    return {key: list(names) for key in SETS}


def process(*names: str, args: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A process as BuildKit writes it; the order of fields is that of the specification."""
    return {"user": {}, "args": args or ["/bin/sh"], "cwd": "/", "capabilities": capabilities(*names), **more}


class Wrapped:
    """The wrapper in front of a runc that only tells how it was called."""

    def __init__(self, directory: Path) -> None:
        real = directory / "a runc"
        real.write_text('#!/bin/sh\necho "called with $*"\n')
        real.chmod(0o755)
        self.path = directory / "wrapper"
        self.path.write_text(wrapper(real))
        self.path.chmod(0o500)
        self.bundle = directory / "bundle"
        self.bundle.mkdir()
        self.config = self.bundle / "config.json"

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.path, *arguments], capture_output=True, text=True, check=False)

    def start(self, config: Any) -> subprocess.CompletedProcess[str]:
        text = config if isinstance(config, str) else json.dumps(config, separators=(",", ":")) + "\n"
        self.config.write_text(text)
        return self.run("--log", "l", "--log-format", "json", "run", "--bundle", self.bundle, "some-id")


@pytest.fixture
def wrapped(tmp_path: Path) -> Wrapped:
    return Wrapped(tmp_path)


@pytest.mark.parametrize(
    "given",
    [ORDINARY, ["CAP_NET_RAW"], ["CAP_NET_RAW", "CAP_CHOWN"], ["CAP_CHOWN", "CAP_NET_RAW"], ["CAP_CHOWN"], []],
)
def test_a_step_loses_one_capability_in_every_set_and_nothing_else_changes(wrapped, given):
    started = wrapped.start({"ociVersion": "1.2", "process": process(*given), "linux": {"seccomp": {"x": [1]}}})
    assert started.stdout == f"called with --log l --log-format json run --bundle {wrapped.bundle} some-id\n"
    kept = [name for name in given if name != "CAP_NET_RAW"]
    assert json.loads(wrapped.config.read_text()) == {
        "ociVersion": "1.2",
        "process": process(*kept),
        "linux": {"seccomp": {"x": [1]}},
    }


def test_the_words_of_a_build_change_nothing(wrapped):
    words = [
        "CAP_NET_RAW",
        '"capabilities":{"bounding":["CAP_SYS_ADMIN"]}',
        "\\",
        '"CAP_NET_RAW",',
        "$(id) `id` %s\n",
        "é",
    ]
    config = {"process": process(*ORDINARY, args=words, env=words), "hostname": "CAP_NET_RAW"}
    assert wrapped.start(config).returncode == 0
    expected = {"process": process("CAP_CHOWN", "CAP_SETUID", args=words, env=words), "hostname": "CAP_NET_RAW"}
    assert json.loads(wrapped.config.read_text()) == expected


def test_a_process_that_is_added_to_a_container_loses_it_too(wrapped, tmp_path):
    file = tmp_path / "process.json"
    file.write_text(json.dumps(process(*ORDINARY), separators=(",", ":")))
    assert wrapped.run("exec", "--process", file, "--pid-file", "p", "some-id").returncode == 0
    assert json.loads(file.read_text()) == process("CAP_CHOWN", "CAP_SETUID")


def test_an_entitled_step_keeps_every_capability(wrapped):
    config = {"process": process("CAP_NET_RAW", "CAP_SYS_ADMIN")}
    assert wrapped.start(config).returncode == 0
    assert json.loads(wrapped.config.read_text()) == config


@pytest.mark.parametrize(
    "unexpected",
    [
        json.dumps({"process": process(*ORDINARY)}, indent=1),
        json.dumps({"process": process(*ORDINARY)}),
        json.dumps({"process": {"args": ["/bin/sh"]}}, separators=(",", ":")),
        '{"capabilities":{\n"bounding":["CAP_NET_RAW"]}}',
        "",
    ],
)
def test_a_file_that_it_does_not_understand_is_not_run(wrapped, unexpected):
    refused = wrapped.start(unexpected)
    assert refused.returncode == 1
    assert "CAP_NET_RAW cannot be taken" in refused.stderr
    assert "called" not in refused.stdout
    assert wrapped.config.read_text() == unexpected


def test_a_start_without_a_file_is_not_run(wrapped):
    assert "without --bundle" in wrapped.run("run", "some-id").stderr
    assert "is missing" in wrapped.run("create", "--bundle", wrapped.bundle, "some-id").stderr


def test_other_commands_are_passed_on(wrapped):
    assert wrapped.run("--log", "l", "kill", "some-id", "9").stdout == "called with --log l kill some-id 9\n"


async def no_report(message: str) -> None:
    raise AssertionError(message)


async def output(build) -> str:
    return (await (await build).communicate())[0].decode()


async def test_a_build_step_cannot_open_a_raw_socket_unless_its_pool_says_so(runtime, build, tmp_path):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    text = await output(build(endpoint, "raw"))
    assert "packet socket: refused" in text
    assert "raw socket: refused" in text
    assert SlotFiles(tmp_path / "home", SLOT).runc_wrapper.stat().st_mode & 0o777 == 0o500

    await runtime.daemons.stop(SLOT)
    pool = a_pool(security={"netRaw": True})
    endpoint = await runtime.daemons.start(SLOT, "uid-2", "anna", pool, no_report)
    assert "packet socket: opened" in await output(build(endpoint, "raw", options=["--no-cache"]))


async def test_an_entitled_build_step_has_every_capability(runtime, build):
    pool = a_pool(buildkit_config='insecure-entitlements = ["security.insecure"]\n')
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", pool, no_report)
    text = await output(build(endpoint, "raw", options=["--allow=security.insecure"], flags="--security=insecure"))
    assert "packet socket: opened" in text
