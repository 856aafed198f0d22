"""The real buildx and buildctl show the sentence of a refusal at once, and do not try again."""

from __future__ import annotations

import asyncio
import os

import pytest

from bkpool.core.worker import EndReason

pytestmark = pytest.mark.slow

FEW = 8
"""Connections of one command. After code 14 buildx tries again for 20 s and makes more than 20 of them
(docs/clients.md#refusals)."""


async def run(*command, **environment):
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        env={"PATH": os.environ["PATH"], **{name: str(value) for name, value in environment.items()}},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.fixture
def released(world):
    world.lease()
    world.end_lease("a", EndReason.RELEASED)
    return world.certificate(world.token("a")).files


async def test_buildx_shows_the_refusal_at_once(world, released, buildx, tmp_path):
    cert, key = released
    home = {"HOME": tmp_path, "BUILDX_CONFIG": tmp_path / "buildx", "DOCKER_CONFIG": tmp_path / "docker"}
    options = f"cacert={world.ca.file},cert={cert},key={key},servername=localhost"
    address = f"tcp://127.0.0.1:{world.port}"
    code, output = await run(
        buildx, "create", "--name", "b", "--driver", "remote", "--driver-opt", options, address, **home
    )
    assert code == 0, output
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    code, output = await run(buildx, "build", "--builder", "b", tmp_path, **home)
    assert code != 0
    assert "the lease was released. Run `bkpool allocate` again." in output
    assert 0 < world.metric("refusals_total", reason="LeaseReleased") <= FEW


async def test_buildctl_shows_the_refusal_at_once(world, released, buildctl):
    cert, key = released
    tls = ["--tlscacert", world.ca.file, "--tlscert", cert, "--tlskey", key, "--tlsservername", "localhost"]
    code, output = await run(buildctl, "--addr", f"tcp://127.0.0.1:{world.port}", *tls, "debug", "workers")
    assert code != 0
    assert "the lease was released. Run `bkpool allocate` again." in output
    assert 0 < world.metric("refusals_total", reason="LeaseReleased") <= FEW
