"""The benchmark with almost no load: it gives figures, names what it could not measure, and leaves no process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from harness import only_on

pytestmark = only_on("process", "it measures gateways alone, without an appliance or a worker")

ROOT = Path(__file__).parents[1]


BUILDS_NO_PROXY = """#!/bin/sh
case "$*" in */ghostunnel) echo "a test does not wait for that" >&2; exit 1;; esac
exec {go} "$@"
"""
"""Builds the load client. The proxy in Go takes minutes, so it is measured only where it was built before."""


def test_bench_measures_each_installed_proxy_and_says_why_it_leaves_out_others(tmp_path: Path) -> None:
    wanted = ["--quick", "--json", "--only", "gateway", "--loads", "up,connections"]
    go = shutil.which("go")
    assert go, "bench builds its load client with Go: install it"
    programs, temporary = tmp_path / "programs", tmp_path / "tmp"
    programs.mkdir()
    temporary.mkdir()
    (programs / "go").write_text(BUILDS_NO_PROXY.format(go=go))
    (programs / "go").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "TMPDIR": str(temporary), "PATH": path}
    command = [sys.executable, "-m", "bench", *wanted]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, timeout=900)
    document = json.loads(done.stdout)
    assert [(row["leg"], row["load"]) for row in document["gateway"]] == [
        ("unix", "up"),
        ("unix", "connections"),
        ("tls", "up"),
        ("tls", "connections"),
    ]
    for row in document["gateway"]:
        assert row["figures"]["bkpool"][0] > 0
        for name, [figure] in row["figures"].items():
            assert figure or any(note.startswith(f"{name}, ") for note in document["notes"])
    left = [process for process in Path("/proc").glob("[0-9]*") if _has_open(process, f"{temporary}/bkbench-")]
    assert not left, "a proxy or the load client still runs after its measurement"
    assert list(temporary.iterdir()) == []


def _has_open(process: Path, prefix: str) -> bool:
    """Returns whether the process has such a file open, also if it is deleted.

    Each proxy and the load client has a log.
    """
    try:
        return any(str(descriptor.readlink()).startswith(prefix) for descriptor in (process / "fd").iterdir())
    except OSError:
        return False  # it has ended, or belongs to another user


def test_bench_measures_leases_in_a_cluster_without_nodes() -> None:
    wanted = ["--only", "cluster", "--pools", "2", "--workers", "4", "--replicas", "2", "--seconds", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *wanted], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {what: value for what, _, value in json.loads(done.stdout)["cluster"]["rows"]}
    assert not [what for what in rows if what.startswith("failed")], rows
    assert float(rows["writes per lease"]) > 2, "at least the claim and its end"
    assert float(rows["CPU of 2 control replicas per lease, ms"]) > 0
    assert float(rows["bytes of watches per lease, KB"]) > 1
    assert any(what.startswith("per lease: gateways, update") for what in rows), "a gateway has registered"
