"""A build whose worker is killed fails at once, also if the worker stays away long (found by `nox -s chaos_kind`).

buildx ends a cut build only after its gRPC client, which connects again within milliseconds, got an answer. So the
gateway answers connections within half a second at once. A new command of buildx then polls, and is held until the
worker is back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

from harness import GATEWAY_HOLDS, eventually, only_on, read_until
from support.processes import freeze

AWAY = 3.0  # seconds; much less than a wait at the gateway

pytestmark = only_on("process", "only here a test can delay the restart of a worker")


def resume(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("moment", ["load build definition", "sleeping"])
def test_a_build_that_is_cut_ends_at_once_though_its_worker_stays_away(make_appliance, context, moment):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    builder = appliance.builder(appliance.allocate(), "cut")
    build = ("docker", "buildx", "build", "--builder", builder, "--progress", "plain")
    running = appliance.start(*build, context.dockerfile("say begun", "sleep 300s"))
    read_until(running, moment)
    (worker,) = appliance.workers()
    appliance.world.kill_worker(worker)
    killed = time.monotonic()
    (successor,) = eventually(
        lambda: [pid for pid in appliance.workers() if pid != worker], "the worker is started again"
    )
    freeze(successor)
    out, _ = running.communicate(timeout=60)
    assert time.monotonic() - killed < GATEWAY_HOLDS, out
    assert running.returncode != 0
    assert "ERROR: failed to build: " in out
    begun = time.monotonic()
    back = threading.Timer(AWAY, resume, (successor,))
    back.start()
    try:
        appliance.build(builder, context.dockerfile("say well")).ok()
        assert time.monotonic() - begun > AWAY, "the gateway holds it until the worker is back"
    finally:
        back.join()
