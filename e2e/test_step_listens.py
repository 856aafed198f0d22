"""A build step that listens to packets, while tokens cross the loopback of the appliance's machine in clear."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from harness import WAIT_TIMEOUT, Appliance, Context, end_steps, eventually, only_on, pool, read_until

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
    listener = f"listens-{os.getpid()}"
    context.dockerfile(f"sniff {listener}")
    listening = appliance.start("bkpool", "build", "--pool", "raw", "--progress", "plain", str(context.path))
    read_until(listening, "sniffing")
    for _ in range(3):
        assert appliance.http("GET", "/api/v1/pools")[0] == 200
    end_steps("sniff", listener)
    output = listening.stdout.read()
    assert listening.wait(WAIT_TIMEOUT) == 0, output
    assert set(re.findall(r"sniffed (\S+)", output)) == {"of-this"}
    assert token[:SHOWN] not in output


def test_a_step_may_not_listen_by_default(appliance, tmp_path, program):
    context = Context(tmp_path / "context", program).dockerfile(f"sniff deaf-{os.getpid()}")
    output = appliance.cli("build", "--progress", "plain", str(context)).ok().text
    assert "deaf: operation not permitted" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen in on the machine's loopback")
def test_outside_of_a_workers_network_the_same_program_hears_the_token(appliance, tmp_path, program, token):
    """So the test above would fail if a step shared the machine's network."""
    output = tmp_path / "output"

    def hears_it() -> bool:
        assert appliance.http("GET", "/api/v1/pools")[0] == 200
        return f"sniffed {token[:SHOWN]}" in output.read_text()

    with output.open("w") as file, subprocess.Popen([program, "sniff", "outside"], stdout=file) as listening:
        try:
            eventually(hears_it, "the program hears the token")
        finally:
            listening.kill()
