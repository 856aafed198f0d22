"""kill -9 of any process at any time: leases continue with the same certificates, and no process is orphaned."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from datetime import datetime, timedelta

import pytest
from delayed_start import DelayedStart

from harness import GATEWAY_HOLDS, Appliance, alive, eventually, only_on, read_until, really_ran


def undelivered(appliance: Appliance) -> int:
    """How many leases no caller has, as the file of the store says."""
    with closing(sqlite3.connect(f"file:{appliance.home / 'state.db'}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT data FROM objects WHERE kind = 'BuildKitWorker'").fetchall()
    leases = [json.loads(data)["spec"].get("allocation") or {} for (data,) in rows]
    return sum(lease.get("undelivered") is not None for lease in leases)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tools, world):
    """An appliance that was killed before it had sent the answers of four leases, runs again, and a fifth lease.

    The four claims are in the store, with the digests of their tokens.
    """
    appliance = Appliance(tmp_path_factory.mktemp("interrupted"), tools, world=world)
    starts = DelayedStart(appliance)
    appliance.up_with({"scaling": {"max": 5}})
    held = appliance.allocate().lease
    eventually(lambda: undelivered(appliance) == 0, "the answer is noted as delivered")
    starts.shut()
    waiting = [appliance.start(*appliance.program, "allocate") for _ in range(4)]
    eventually(lambda: undelivered(appliance) == 4, "four claims")
    appliance.kill()
    for process in waiting:
        process.communicate(timeout=60)
        assert process.returncode != 0
    starts.open()
    appliance.up()
    yield appliance, held
    appliance.finish()


@only_on("process", "it reads the file of the store")
def test_leases_whose_answer_the_killed_appliance_had_not_sent_are_there_at_first(interrupted):
    appliance, _ = interrupted
    assert appliance.pool()["allocated"] == 5


def test_leases_continue_after_the_appliance_is_killed(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "before")
    appliance.build(builder, context.dockerfile("say first")).ok()
    eventually(lambda: appliance.pool()["idle"] == 1, "the floor")
    before = appliance.workers()
    assert len(before) == 2

    appliance.kill()
    assert appliance.workers() == before, "workers continue without the appliance"
    appliance.up()

    assert appliance.workers() == before, "the workers are adopted, not started again"
    again = appliance.build(builder, context.path).ok()
    assert not really_ran(again, "first"), "the same certificate leads to the same worker"
    appliance.release(certificates.lease).ok()
    eventually(lambda: appliance.pool()["allocated"] == 0, "the lease has ended")


def test_a_build_fails_at_once_when_the_appliance_is_killed(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "middle")
    path = context.dockerfile("say begun", "sleep 300s")
    running = appliance.start("docker", "buildx", "build", "--builder", builder, "--progress", "plain", path)
    read_until(running, "sleeping")
    appliance.kill()
    killed = time.monotonic()
    running.communicate(timeout=60)
    assert running.returncode != 0
    assert time.monotonic() - killed < GATEWAY_HOLDS, "the open build fails at once"
    appliance.up()
    appliance.release(certificates.lease).ok()
    begin = time.monotonic()
    appliance.allocate(name="next")
    assert time.monotonic() - begin < 45, "the registration of the killed gateway does not keep the worker"


def test_a_killed_worker_comes_back_with_its_cache(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}, "cache": {"backends": [{"type": "local"}]}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "worker")
    appliance.build(builder, context.dockerfile("say kept")).ok()
    running = appliance.start(
        *("docker", "buildx", "build", "--builder", builder, "--progress", "plain"),
        context.dockerfile("say kept", "sleep 300s"),
    )
    read_until(running, "sleeping")
    (worker,) = appliance.workers()
    appliance.world.kill_worker(worker)
    killed = time.monotonic()
    out, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert time.monotonic() - killed < GATEWAY_HOLDS, out
    again = appliance.build(
        builder, context.dockerfile("say kept")
    ).ok()  # the gateway holds the connection until the worker is back
    assert not really_ran(again, "kept"), "the worker has the cache of its slot"
    assert len(appliance.workers()) == 1
    assert appliance.pool()["members"][0]["failures"] == 1


@pytest.mark.parametrize("moment", ["claimed", "starting"])
def test_a_waiting_caller_gets_a_worker_after_the_appliance_was_killed(make_appliance, context, moment):
    appliance = make_appliance()
    starts = DelayedStart(appliance)
    appliance.up_with({"scaling": {"max": 1}})
    starts.shut()  # a pod takes long enough by itself
    waiting = appliance.start(*appliance.program, "allocate", "--job-id", "job-1")
    if moment == "claimed":
        eventually(lambda: appliance.pool()["allocated"] == 1, "the claim")
    else:
        eventually(appliance.workers, "buildkitd was started")
    appliance.kill()
    waiting.communicate(timeout=60)
    assert waiting.returncode != 0
    starts.open()
    appliance.up()
    certificates = appliance.allocate("--job-id", "job-1")  # the same job gets the same lease, if there was one
    appliance.build(appliance.builder(certificates, f"cold-{moment}"), context.dockerfile("say well")).ok()
    assert len(appliance.workers()) == 1
    assert appliance.pool()["workers"] == 1


@only_on("process", "pods continue without their appliance by design")
def test_down_ends_the_workers_of_a_killed_appliance(make_appliance):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 1}})
    appliance.all_idle()
    appliance.kill()
    assert appliance.workers()
    assert appliance.down().ok().json == {"stopped": False, "purged": False, "leftovers": 1}
    assert appliance.daemons() == []


@only_on("process", "pods continue while no appliance runs")
def test_down_and_up_again_keeps_leases_and_caches(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 2}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "kept")
    appliance.build(builder, context.dockerfile("say kept")).ok()
    appliance.down().ok()
    assert appliance.daemons() == []
    appliance.down().ok()  # a second time is no error
    appliance.up()
    appliance.up()
    assert not really_ran(appliance.build(builder, context.path).ok(), "kept")


def test_down_waits_for_open_builds_and_now_cuts_them(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    builder = appliance.builder(appliance.allocate(), "drain")
    build = ("docker", "buildx", "build", "--builder", builder, "--progress", "plain")
    running = appliance.start(*build, context.dockerfile("say begun", "sleep 3s"))
    read_until(running, "sleeping")
    assert appliance.down().ok()
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0, out
    appliance.up()
    running = appliance.start(*build, context.dockerfile("sleep 301s"))
    read_until(running, "sleeping")
    pid = appliance.described["pid"]
    appliance.down("--now").ok()
    assert not alive(pid)
    assert running.wait(timeout=60) != 0


def test_purge_removes_everything(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    appliance.build(appliance.builder(appliance.allocate(), "purged"), context.dockerfile("say gone")).ok()
    appliance.down("--purge").ok()
    assert [path.name for path in appliance.home.iterdir()] == ["lock"]


@only_on("process", "it reads the file of the store")
def test_leases_whose_answer_the_killed_appliance_had_not_sent_end_and_others_go_on(interrupted):
    """It is the last test: they end after two minutes, in which the other tests run."""
    appliance, held = interrupted
    eventually(lambda: appliance.pool()["allocated"] == 1, "leases that nobody has end", timeout=240)

    def abandoned():
        return [line["timestamp"] for line in appliance.events if line["event"] == "lease.abandoned"]

    ends = eventually(lambda: len(found := abandoned()) == 4 and found, "their ends are in the log")
    first = datetime.fromisoformat(min(ends)) - datetime.fromisoformat(appliance.described["startedAt"])
    assert first > timedelta(seconds=90), "a caller may have got one of them in the last moment"
    assert appliance.http("POST", "/api/v1/workers/lookup", {"token": held["token"]})[0] == 200
