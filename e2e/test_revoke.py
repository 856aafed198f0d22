"""Revoked leases: builds are cut and nothing of them runs on, the next lease is sound, and `release` stays gentle."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import WAIT_TIMEOUT, WAITED, eventually, only_on, read_until

pytestmark = only_on("process", "only here a test sees the processes of a build")


@pytest.fixture
def cleared(appliance):
    """The appliance of the module. Also a test that fails leaves no lease and no build to the next one."""
    yield appliance
    appliance.cli("revoke", "--pool", "default").ok()
    appliance.all_idle()


def running(mark: str) -> list[int]:
    """The processes whose command line has this text: those of build steps, as seen from the host."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


def build_that_sleeps(appliance, context, name: str, mark: str):
    """A lease, and a build on it whose step sleeps for a time that no other process has in its command line."""
    certificates = appliance.allocate(name=name)
    builder = appliance.builder(certificates, name)
    build = ("docker", "buildx", "build", "--builder", builder, "--progress", "plain")
    started = appliance.start(*build, context.dockerfile("say begun", f"sleep {mark}"))
    read_until(started, "sleeping")
    assert running(mark)
    return certificates.lease, builder, started


REVOCATIONS = {
    "release --now": lambda lease: ("release", "--now", "--token", lease["token"]),
    "revoke --worker": lambda lease: ("revoke", "--worker", lease["workerName"]),
    "revoke --identity": lambda _: ("revoke", "--identity", "admin"),
    "revoke --tenant": lambda _: ("revoke", "--tenant", "admin"),
    "revoke --pool": lambda _: ("revoke", "--pool", "default"),
}


@pytest.mark.parametrize("how", REVOCATIONS)
def test_a_revoked_build_is_cut_and_its_step_ends(cleared, context, how):
    """Its lease could drain for an hour. How soon it is cut is tested in tests/gateway/test_revoked_leases.py."""
    appliance = cleared
    mark = f"{3000 + list(REVOCATIONS).index(how)}s"
    lease, builder, build = build_that_sleeps(appliance, context, f"cut{mark}", mark)
    appliance.cli(*REVOCATIONS[how](lease)).ok()
    eventually(lambda: not running(mark), "the step has ended")
    assert build.wait(WAIT_TIMEOUT) != 0
    assert WAITED not in appliance.metrics(), "buildx connects again after a cut, and is not held then"
    by = "with its token" if how.startswith("release") else "by the admin"
    late = appliance.build(builder, context.dockerfile("say never"))
    assert late.code != 0
    assert f"the lease was revoked {by}. Run `bkpool allocate` again." in late.text
    appliance.all_idle()
    again = appliance.builder(appliance.allocate(name=f"again{mark}"), f"again{mark}")
    appliance.build(again, context.dockerfile("say well")).ok()


def test_a_build_that_outlived_its_release_is_cut_by_a_revocation(cleared, context):
    appliance = cleared
    lease, _, build = build_that_sleeps(appliance, context, "drained", "3100s")
    appliance.release(lease).ok()
    eventually(lambda: "Draining" in {one["phase"] for one in appliance.pool()["members"]}, "the worker drains")
    assert running("3100s"), "`release` lets a build finish"
    (ended,) = appliance.cli("revoke", "--worker", lease["workerName"]).ok().json["revoked"]
    assert ended["workerName"] == lease["workerName"]
    eventually(lambda: not running("3100s"), "the step has ended")
    assert build.wait(WAIT_TIMEOUT) != 0


def test_a_crash_right_after_the_revocation_does_not_save_the_build(make_appliance, context):
    """The revocation is in the store before it is answered. The next start carries it out."""
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    lease, _, build = build_that_sleeps(appliance, context, "crash", "3200s")
    appliance.cli("release", "--now", "--token", lease["token"]).ok()
    appliance.kill()
    appliance.up()
    eventually(lambda: not running("3200s"), "the step has ended")
    assert build.wait(WAIT_TIMEOUT) != 0
    refused = appliance.cli("renew", "--token", lease["token"])
    assert refused.code == 7
    assert "revoked" in refused.err
    appliance.all_idle()
