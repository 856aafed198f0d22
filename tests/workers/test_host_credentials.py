"""Builds that look for the credentials of the host, where buildkitd itself would find them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bkpool.core.names import Slot
from bkpool.core.pool import PoolSpec
from bkpool.workers.processes.environment import PATH
from bkpool.workers.processes.init_program import InitProgram
from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Sandbox
from bkpool.workers.processes.slot_files import SlotFiles
from bkpool.workers.processes.worker_init import MountSettings
from support.fake_s3 import FakeS3, fake_s3
from support.objects import pool as a_pool

pytestmark = pytest.mark.slow

SLOT = Slot("default", "default", 0)
HOSTS_KEY, OWN_KEY = "AKIAOFTHEHOST", "AKIAOFTHETENANT"


async def no_report(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """The environment of an operator who is logged in to clouds."""
    credentials = tmp_path / "operator" / ".aws" / "credentials"
    credentials.parent.mkdir(parents=True)
    credentials.write_text(f"[default]\naws_access_key_id = {HOSTS_KEY}\naws_secret_access_key = x\n")
    own = {"HOME": str(tmp_path / "operator"), "AWS_ACCESS_KEY_ID": HOSTS_KEY, "AWS_SECRET_ACCESS_KEY": "x"}
    return {**os.environ, **own}


async def test_a_cache_in_s3_is_never_signed_by_the_host(host, binaries, build, tmp_path):
    runtime = ProcessRuntime(tmp_path / "home", binaries, environ=host)
    with fake_s3() as s3:
        pool = a_pool(networking={"hostPorts": [s3.port]})
        endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", pool, no_report)
        assert (await signers(s3, build, endpoint)) == set()
        own = {"access_key_id": OWN_KEY, "secret_access_key": "y"}
        assert (await signers(s3, build, endpoint, **own)) == {OWN_KEY}  # so the server can be reached
    await runtime.purge()
    await runtime.close(stop_workers=True)


def variables(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


async def signers(s3: FakeS3, build, endpoint: str, **attributes: str) -> set[str]:
    """Whose keys signed the requests of a build that exports its cache."""
    s3.signers.clear()
    process = await build(endpoint, options=[f"--export-cache={s3.cache(**attributes)}"])
    text = (await process.communicate())[0].decode()
    assert "exporting cache to Amazon S3" in text, text
    return set(s3.signers)


async def test_a_worker_has_only_the_variables_that_it_needs(runtime, tmp_path):
    await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    given = variables(SlotFiles(tmp_path / "home", SLOT).read_daemon().pid)
    assert not any(os.scandir(given["HOME"]))
    assert given["PATH"] == PATH
    needed = {"PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "BKPOOL_SLOT", "_", "OLDPWD", "PWD", "SHLVL"}
    switches = {"AWS_EC2_METADATA_DISABLED", "AZURE_TOKEN_CREDENTIALS", "GCE_METADATA_HOST", "NO_GCE_CHECK"}
    passed = {name for name in given if name.lower().endswith("_proxy") or name.startswith("SSL_CERT_")}
    assert set(given) <= needed | switches | passed
    assert set(given) >= switches


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user cannot read the keys of root")
def test_ssh_looks_for_keys_in_the_empty_home_of_the_worker(binaries, tmp_path):
    sandbox = Sandbox(binaries, {})
    mounts: MountSettings = {"home": str(tmp_path / "empty"), "cgroups": []}
    (tmp_path / "worker").mkdir()
    init = InitProgram(None, {}, frozenset).command(tmp_path / "worker" / "init", PoolSpec(), mounts)
    command = sandbox.wrap([*init, "/usr/bin/getent", "passwd", "root"], tmp_path / "state")
    environment = sandbox.environment(tmp_path / "empty")
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.split(":")[5] == str(tmp_path / "empty")
