"""Waiting for a worker that restarts: users notice nothing, or get the reason soon (docs/clients.md#waiting)."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from delayed_start import DelayedStart
from raw_call import Outcome, call

from harness import WAITED, Answer, Appliance, Context, eventually, only_on, really_ran, run

pytestmark = only_on(
    "process", "the start of a daemon is delayed on this machine; the gateway does the same for pods"
)

FIRST, SECOND, LATER = 15.0, 12.0, 2.0
"""Seconds that a client is held at least (docs/clients.md#waiting). That it is not longer is tested without a real
clock in tests/gateway/test_machine.py."""
UNAVAILABLE, FAILED_PRECONDITION = 14, 9  # https://grpc.io/docs/guides/status-codes/
CAUSE = "was killed by SIGKILL"


def _buildctl(appliance, certificates):
    gateway = f"tcp://localhost:{appliance.ports['gateway']}"
    return [appliance.tools["buildctl"], "--addr", gateway, *certificates.buildctl, "debug", "info"]


def _kill_worker(appliance):
    """Kills the worker, whose next start is delayed, and waits until the appliance knows it."""
    (worker,) = appliance.workers()
    appliance.world.kill_worker(worker)
    eventually(lambda: appliance.pool()["members"][0]["failures"] == 1, "its end was seen")


def _is_held(appliance, before, clients=1):
    """Waits until so many clients more than before have a lease and no worker."""
    eventually(lambda: _admitted(appliance) >= before + clients, "they have a lease and no worker")


def _admitted(appliance):
    """Returns how many connections have done their handshake and are admitted or ended."""
    metrics = appliance.metrics()
    handshakes = re.search(r'^buildkit_gateway_handshake_seconds_count\{outcome="ok"\} (\S+)', metrics, re.MULTILINE)
    pending = re.search(r"^buildkit_gateway_pending_connections (\S+)", metrics, re.MULTILINE)
    return float(handshakes[1]) - float(pending[1])


def _up(appliance):
    """An appliance whose only worker is leased and runs."""
    doorstep = DelayedStart(appliance)
    appliance.extra_env["BKPOOL_WORKERS_START_TIMEOUT"] = "10m"  # no delayed start is given up
    appliance.up_with({"scaling": {"max": 1}, "cache": {"backends": [{"type": "local"}]}})
    return doorstep, appliance.allocate()


def test_clients_are_held_until_their_worker_is_back_and_their_users_notice_nothing(make_appliance, context):
    """The clients are a build of buildx and a buildctl command. The worker comes back with its cache."""
    appliance = make_appliance()
    doorstep, certificates = _up(appliance)
    builder = appliance.builder(certificates, "held")
    appliance.build(builder, context.dockerfile("say kept")).ok()
    doorstep.shut()
    _kill_worker(appliance)
    before = _admitted(appliance)
    with ThreadPoolExecutor() as clients:
        building = clients.submit(appliance.build, builder, context.dockerfile("say kept", "say after"))
        asking = clients.submit(run, *_buildctl(appliance, certificates), env=appliance.env)
        _is_held(appliance, before, clients=2)
        doorstep.open()
        built, asked = building.result().ok(), asking.result().ok()
    assert really_ran(built, "after")
    assert not really_ran(built, "kept")
    assert "ERROR" not in built.text
    assert asked.err == ""


def test_clients_are_refused_as_soon_as_their_worker_has_failed(make_appliance, context):
    """A worker that fails at each start loses its lease.

    Waiting clients are refused at once, before their time is over.
    """
    appliance = make_appliance()
    appliance.extra_env["BKPOOL_CONTROLLER_MAX_FAILURES"] = "2"
    doorstep, certificates = _up(appliance)
    builder = appliance.builder(certificates, "lost")
    doorstep.shut()
    _kill_worker(appliance)
    before = _admitted(appliance)
    with ThreadPoolExecutor() as clients:
        building = clients.submit(appliance.build, builder, context.dockerfile("say never"))
        _is_held(appliance, before)
        doorstep.break_()
        doorstep.open()
        built = building.result()
    assert built.code != 0
    assert "the lease ended because its worker failed" in built.text
    assert "the disk is missing" in built.text
    assert "bkpool allocate" in built.text
    assert WAITED not in appliance.metrics()


@dataclass
class Waits:
    """The results of clients that waited one after the other for a worker that never came back.

    The three kinds of clients waited at the same time.
    """

    calls: list[Outcome]
    buildx: Answer
    buildctl: list[Answer]


@pytest.fixture(scope="module")
def waits(tmp_path_factory, tools, world, program):
    appliance = Appliance(tmp_path_factory.mktemp("waits"), tools, world=world)
    try:
        doorstep, certificates = _up(appliance)
        path = Context(appliance.base / "context", program).dockerfile("say never")
        builder = appliance.builder(certificates, "never")
        doorstep.shut()
        _kill_worker(appliance)
        with ThreadPoolExecutor() as clients:
            calls = clients.submit(lambda: [call(appliance, certificates) for _ in range(3)])
            buildx = clients.submit(appliance.build, builder, path)
            command = _buildctl(appliance, certificates)
            buildctl = clients.submit(lambda: [run(*command, env=appliance.env) for _ in range(2)])
        assert WAITED in appliance.metrics()
        yield Waits(calls.result(), buildx.result(), buildctl.result())
    finally:
        appliance.finish()


def test_a_held_client_gets_nothing_until_its_time_is_over_and_then_status_and_goaway(waits):
    """Code 14 after 15 s, then code 9 after 12 s, then code 9 after 2 s. Each message has the cause."""
    first, second, later = waits.calls
    assert first.silence >= FIRST
    assert second.silence >= SECOND
    assert later.silence >= LATER
    assert [outcome.code for outcome in waits.calls] == [UNAVAILABLE, FAILED_PRECONDITION, FAILED_PRECONDITION]
    assert all(outcome.goaway and CAUSE in outcome.message for outcome in waits.calls)
    assert "is not ready yet" in first.message
    assert "did not become ready in time" in second.message


def test_buildx_shows_the_cause_of_its_second_wait(waits):
    """It waits twice without help, because the first refusal asks it to try again. If that took longer than the 20 s
    for which it polls, it would not show the cause."""
    assert waits.buildx.code != 0
    assert "did not become ready in time" in waits.buildx.text
    assert CAUSE in waits.buildx.text
    assert "bkpool logs default-worker-0" in waits.buildx.text
    assert waits.buildx.seconds >= FIRST + SECOND, waits.buildx.text


def test_buildctl_shows_the_refusal_of_its_first_wait(waits):
    """It calls once. Before it shows the answer, it waits again to send its traces: 15 s + 12 s, later 2 s + 2 s."""
    first, later = waits.buildctl
    assert all(answer.code != 0 and CAUSE in answer.err for answer in waits.buildctl)
    assert "Unavailable: worker default/default-worker-0 is not ready yet" in first.err
    assert first.seconds >= FIRST, first.err
    assert "FailedPrecondition: worker default/default-worker-0 did not become ready in time" in later.err
    assert later.seconds >= LATER, later.err
