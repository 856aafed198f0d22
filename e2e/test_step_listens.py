"""A build step that listens to packets, while tokens cross the loopback of the appliance's machine in clear."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from harness import Appliance, Context, only_on, pool, read_until

pytestmark = only_on("process", "a pod has a loopback of its own")

SHOWN = 7
"""Characters of a token that the listening program tells."""


@pytest.fixture(scope="module")
def appliance(tmp_path_factory, tools, world) -> Iterator[Appliance]:
    appliance = Appliance(tmp_path_factory.mktemp("listens"), tools, world=world)
    appliance.up_from([pool("default"), pool("raw", security={"netRaw": True})])
    yield appliance
    appliance.finish()


@pytest.fixture
def token(appliance: Appliance) -> str:
    return (appliance.home / "admin.token").read_text().strip()


def test_a_step_that_may_listen_hears_its_own_network_only(appliance, tmp_path, program, token):
    context = Context(tmp_path / "context", program)
    context.dockerfile(f"say {os.getpid()}", "sniff 3s")
    listening = appliance.start("bkpool", "build", "--pool", "raw", "--progress", "plain", str(context.path))
    read_until(listening, "sniffing")
    for _ in range(3):
        assert appliance.http("GET", "/api/v1/pools")[0] == 200
    output = listening.stdout.read()
    assert listening.wait(60) == 0, output
    assert set(re.findall(r"sniffed (\S+)", output)) == {"of-this"}
    assert token[:SHOWN] not in output


def test_a_step_may_not_listen_by_default(appliance, tmp_path, program):
    context = Context(tmp_path / "context", program).dockerfile(f"say {os.getpid()}", "sniff 1s")
    output = appliance.cli("build", "--progress", "plain", str(context)).ok().text
    assert "deaf: operation not permitted" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen in on the machine's loopback")
def test_outside_of_a_workers_network_the_same_program_hears_the_token(appliance, program, token):
    """So the test above would fail if a step shared the machine's network."""
    with subprocess.Popen([program, "sniff", "2s"], stdout=subprocess.PIPE, text=True) as listening:
        read_until(listening, "sniffing")
        assert appliance.http("GET", "/api/v1/pools")[0] == 200
        assert f"sniffed {token[:SHOWN]}" in listening.stdout.read()
