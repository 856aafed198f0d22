"""What a person at the keyboard does, with real builds: `down` twice, kill -9 of `bkpool build`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from harness import WAIT_TIMEOUT, Appliance, Certificates, Context, end_steps, eventually, only_on, read_until, steps
from terminal import Terminal

pytestmark = only_on("process", "the steps of a build are processes of this machine only here")


@dataclass
class Killed:
    """An appliance with two leases. The step of a build holds under this name on one, and bkpool was killed."""

    appliance: Appliance
    context: Context
    step: str
    other: Certificates
    """The other lease. Its build has ended."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tools, world, program):
    """It is made for the first test, and used by the last one: its lease ends after a minute."""
    appliance = Appliance(tmp_path_factory.mktemp("killed"), tools, world=world)
    context = Context(appliance.base / "context", program)
    try:
        appliance.up_with({"scaling": {"max": 2}})
        other = appliance.allocate("--ttl", "1h")
        appliance.build(appliance.builder(other, "other"), context.dockerfile("say done")).ok()
        step = f"kill-{os.getpid()}"
        build = appliance.start(
            *(*appliance.program, "build", "--progress", "plain", "--ttl", "1h", context.dockerfile(f"hold {step}"))
        )
        read_until(build, "holding")
        build.kill()
        yield Killed(appliance, context, step, other)
    finally:
        appliance.finish()


def test_kill_9_of_a_build_ends_its_steps(killed):
    eventually(lambda: not steps("hold", killed.step), "the step has ended")


def test_a_second_down_joins_the_drain_and_the_build_finishes(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    step = f"down-{os.getpid()}"
    build = appliance.start(
        *(appliance.bin / "bkpool", "build", "--progress", "plain"),
        *("--output", f"type=oci,dest={appliance.base}/image.tar", context.dockerfile(f"hold {step}")),
    )
    read_until(build, "holding")
    with Terminal(appliance.bin / "bkpool", "down", env=appliance.env) as first:
        shown = first.until("of admin, ")
        assert "waiting for 1 build, at most until " in shown
        assert "default-worker-0: job " in shown
        first.interrupt()
        assert first.ended() == 130
    refused = appliance.cli("up", "-d", *appliance.world.options())
    assert refused.code == 74
    assert "bkpool is stopping (pid " in refused.err
    assert "default-worker-0: job " in refused.err
    second = appliance.start(appliance.bin / "bkpool", "down")
    read_until(second, "default-worker-0: job ")
    assert build.poll() is None
    end_steps("hold", step)
    out, _ = build.communicate(timeout=WAIT_TIMEOUT)
    assert build.returncode == 0, out
    assert "warning" not in out, "the lease was released"
    lines, _ = second.communicate(timeout=WAIT_TIMEOUT)
    assert second.returncode == 0
    assert '"stopped": true' in lines, "it is down"


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [("127.0.0.5", "tcp://127.0.0.5"), ("[::1]", "tcp://[::1]"), ("0.0.0.0", "tcp://localhost")],
)
def test_a_build_reaches_the_gateway_at_the_address_it_was_given(make_appliance, context, address, endpoint):
    appliance = make_appliance()
    port = appliance.ports["gateway"]
    described = appliance.up("--gateway-address", f"{address}:{port}")
    assert described["gatewayEndpoint"] == f"{endpoint}:{port}"
    appliance.cli("build", "--progress", "plain", str(context.dockerfile("say reached"))).ok()


def test_kill_9_of_a_build_soon_ends_its_lease(killed):
    """Only the lease of `bkpool build`: to another one its holder may connect again."""
    appliance = killed.appliance
    eventually(lambda: appliance.pool()["allocated"] == 1, "the lease has ended", 180)
    (leased,) = (one for one in appliance.pool()["members"] if one["phase"] == "Allocated")
    assert leased["name"] == killed.other.lease["workerName"]
    appliance.cli("build", "--progress", "plain", str(killed.context.dockerfile("say again"))).ok()
