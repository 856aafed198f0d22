"""An appliance that may open too few files for the workers that its pool wants."""

from __future__ import annotations

import sys

from harness import eventually, only_on

pytestmark = only_on("process", "the pods of a cluster are not started by the appliance")

LIMITED = ["/bin/sh", "-c", 'ulimit -n 100; exec "$@"', "sh", sys.executable, "-m", "bkpool"]


def test_an_appliance_with_100_descriptors_runs_what_it_can_answers_and_ends(make_appliance):
    """Before, two of four permits for starts were lost for good, and `down` hung."""
    appliance = make_appliance(program=LIMITED)
    appliance.up_with({"scaling": {"min": 40, "max": 40}}, "--host-network")
    eventually(lambda: "worker.failed" in appliance.log, "the descriptors are used up")
    running = eventually(lambda: (state := appliance.pool())["ready"] >= 8 and state["ready"], "some workers run")
    assert running < 40
    reason = "there are too many open files, the limit is 100"
    eventually(lambda: reason in appliance.cli("status").text, "status says why the others do not")
    [budget] = [one for one in appliance.cli("doctor", "--json").json["checks"] if one["name"] == "budget of files"]
    assert budget["ok"] is None
    assert budget["detail"].startswith("100 open files suffice for 19 connections of builds, ")
    assert "the pools may have 40 workers, so there are too few worker processes" in budget["detail"]
    assert "action.crashed" not in appliance.log
    for _ in range(4):  # as many as there are permits
        before = appliance.workers()
        appliance.world.kill_worker(before[0])
        eventually(
            lambda gone=before[0]: gone not in (now := appliance.workers()) and len(now) >= running,
            "a worker that was killed is started again",
        )
    appliance.down("--now").ok()
    assert appliance.daemons() == []
