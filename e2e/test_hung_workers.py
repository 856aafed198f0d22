"""A buildkitd that hangs costs the build that it hits, and says so in time; everybody else gets another one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from delayed_start import DelayedStart
from raw_call import call

from harness import alive, eventually, only_on, read_until, really_ran
from support.processes import freeze

pytestmark = only_on("process", "these tests stop processes and remove directories of this machine")

IN_TIME = 20.0
"""Seconds until the client of a worker that hangs is told so."""
STALL = 5.0
REPLACED = 20.0
"""Seconds until an idle worker that hangs is replaced: at most 12 until it is asked, and 8."""
HUNG = re.compile(r"buildkitd has not answered for \d+ s, so it was ended")
UNAVAILABLE = 14  # https://grpc.io/docs/guides/status-codes/
KEPT = {"backends": [{"type": "local"}]}


def resume(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def building(appliance, builder, path):
    return appliance.start("docker", "buildx", "build", "--builder", builder, "--progress", "plain", path)


def member(appliance):
    return appliance.pool()["members"][0]


def until_sentence(appliance, certificates):
    """Connects again and again as gRPC does, until there is an answer. Returns it and the time that it took."""
    begun = time.monotonic()
    while (outcome := call(appliance, certificates, timeout=60)) is None:
        pass
    return outcome, time.monotonic() - begun


def test_a_build_on_a_worker_that_hangs_ends_in_time_and_its_lease_goes_on(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}, "cache": KEPT})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "hung")
    running = building(appliance, builder, context.dockerfile("say begun", "sleep 300s"))
    read_until(running, "sleeping")
    (worker,) = appliance.workers()
    freeze(worker)
    hung = time.monotonic()
    with ThreadPoolExecutor() as clients:
        asking = clients.submit(until_sentence, appliance, certificates)
        out, _ = running.communicate(timeout=60)
        took = time.monotonic() - hung
        outcome, asked_for = asking.result()
    assert running.returncode != 0
    assert took < IN_TIME, out
    assert asked_for < IN_TIME
    assert HUNG.search(outcome.message), outcome
    assert (outcome.code, outcome.goaway) == (UNAVAILABLE, True), "a client that polls finds the worker back"
    again = appliance.build(builder, context.dockerfile("say begun", "say well")).ok()
    assert not really_ran(again, "begun"), "the worker has the cache of its slot"
    assert not alive(worker)
    assert member(appliance)["failures"] == 1


def test_a_stall_of_some_seconds_ends_nothing(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "stalled")
    eventually(lambda: appliance.pool()["idle"] == 1, "the floor")
    before = appliance.workers()
    running = building(appliance, builder, context.dockerfile("say begun", "sleep 8s"))
    read_until(running, "sleeping")
    for worker in before:
        freeze(worker)
    going_on = [threading.Timer(STALL, resume, (worker,)) for worker in before]
    for timer in going_on:
        timer.start()
    out, _ = running.communicate(timeout=60)
    for timer in going_on:
        timer.join()
    assert running.returncode == 0, out
    eventually(lambda: appliance.pool()["idle"] == 1, "the idle one is given away again")
    assert appliance.workers() == before
    assert [one["failures"] for one in appliance.pool()["members"]] == [0, 0]


def test_an_idle_worker_that_hangs_is_given_to_nobody_and_replaced(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    appliance.all_idle()
    used = appliance.allocate(name="first")
    appliance.build(appliance.builder(used, "first"), context.dockerfile("say kept")).ok()
    eventually(lambda: appliance.pool()["idle"] == 1, "the floor")  # one that starts later would be ready
    appliance.release(used.lease).ok()
    eventually(lambda: appliance.pool()["idle"] == 2, "the lease has ended")
    hung = appliance.workers()
    for worker in hung:
        freeze(worker)
    stopped = time.monotonic()
    eventually(lambda: appliance.pool()["ready"] == 0, "nobody calls it ready")
    certificates = appliance.allocate(name="next")
    assert time.monotonic() - stopped < REPLACED + STALL, "it waits until one is replaced, and for its start"
    appliance.build(appliance.builder(certificates, "next"), context.dockerfile("say well")).ok()
    eventually(lambda: not any(alive(worker) for worker in hung), "they are ended", timeout=REPLACED + STALL)


def remove(directory):
    """Removes a directory in which programs may be making files."""

    def gone():
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    eventually(gone, f"{directory} is removed")


@pytest.mark.parametrize("leased", [False, True], ids=["idle", "leased"])
def test_workers_whose_directories_are_removed_are_back_before_the_next_build(make_appliance, context, leased):
    """By the end of a session (its runtime directory), or by somebody who tidies up (slots).

    Because of the build before, a gateway is registered for the lease, so it takes longer until the socket is missed.
    """
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 1}, "cache": KEPT})
    appliance.all_idle()
    certificates = appliance.allocate() if leased else None
    if leased:
        appliance.build(appliance.builder(certificates, "before"), context.dockerfile("say before")).ok()
    api = Path(appliance.described["apiSocket"])
    for number, directory in enumerate([api.parent, appliance.home / "slots"]):
        (worker,) = appliance.workers()
        remove(directory)
        eventually(lambda worker=worker: not alive(worker), "it is ended")
        eventually(api.exists, "the socket of the API")
        holder = certificates or appliance.allocate(name=f"of-{number}")
        builder = appliance.builder(holder, f"removed-{number}")
        appliance.build(builder, context.dockerfile(f"say well-{number}")).ok()
        if certificates is None:
            appliance.release(holder.lease).ok()
            eventually(lambda: appliance.pool()["idle"] == 1, "it is idle again")


def test_after_a_restart_nobody_is_given_a_worker_that_does_not_run_any_more(make_appliance, context):
    appliance = make_appliance()
    starts = DelayedStart(appliance)
    appliance.up_with({"scaling": {"min": 2, "max": 3}})
    appliance.all_idle()
    leased = appliance.allocate("--job-id", "before", name="before")
    eventually(lambda: appliance.pool()["idle"] == 2, "the floor")  # one that starts later would not be killed
    starts.shut()
    appliance.kill()
    for worker in appliance.workers():
        appliance.world.kill_worker(worker)
    appliance.up()
    for request in (["--job-id", "before"], []):
        answer = appliance.cli("allocate", *request, "--wait", "1s")
        assert answer.code != 0, "nothing runs"
    starts.open()
    given = [appliance.allocate("--job-id", "before", name="again"), appliance.allocate(name="other")]
    assert given[0].lease["workerName"] == leased.lease["workerName"]
    for number, certificates in enumerate(given):
        appliance.build(appliance.builder(certificates, f"after-{number}"), context.dockerfile("say well")).ok()


def test_six_kills_of_a_floor_worker_do_not_end_the_lease_of_the_next_tenant(make_appliance, context):
    appliance = make_appliance()
    appliance.extra_env["BKPOOL_CONTROLLER_BACKOFF"] = "50ms"
    appliance.up_with({"scaling": {"min": 1, "max": 1}})
    for number in range(1, 7):
        appliance.all_idle()
        (worker,) = appliance.workers()
        appliance.world.kill_worker(worker)
        eventually(lambda number=number: member(appliance)["failures"] == number, f"failure {number}")
    certificates = appliance.allocate()
    appliance.build(appliance.builder(certificates, "next"), context.dockerfile("say well")).ok()
