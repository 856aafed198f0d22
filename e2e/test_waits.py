"""Waiting for a worker that restarts: users notice nothing, or get the reason soon (docs/clients.md#waiting)."""

from __future__ import annotations

import re
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import pytest

from harness import Answer, Appliance, Context, eventually, only_on, really_ran, run

pytestmark = only_on(
    "process", "the start of a daemon is delayed on this machine; the gateway does the same for pods"
)

FIRST, SECOND, LATER = 15.0, 12.0, 2.0  # seconds (docs/clients.md#waiting)
SLACK = 5.0  # seconds, for a busy machine
WELL_UNDER_A_MINUTE = 45.0
UNAVAILABLE, FAILED_PRECONDITION = 14, 9  # https://grpc.io/docs/guides/status-codes/
CAUSE = "was killed by SIGKILL"


class DelayedStart:
    """A script on the appliance's PATH that can delay each start of the real buildkitd or make it fail."""

    def __init__(self, appliance):
        self._shut, self._broken = appliance.base / "shut", appliance.base / "broken"
        body = f"""case "$*" in *--root=*)
while [ -e {self._shut} ]; do sleep 0.05; done
if [ -e {self._broken} ]; then echo 'the disk is missing' >&2; exit 3; fi
esac
exec {appliance.tools["buildkitd"]} "$@\""""
        appliance._script("buildkitd", body)

    def shut(self):
        """Delays each start until `open`."""
        self._shut.touch()

    def open(self):
        self._shut.unlink()

    def break_(self):
        """Makes each start fail from now on."""
        self._broken.touch()


@dataclass
class Outcome:
    """How a connection ended."""

    silence: float
    """Seconds from the beginning of the connection to the first byte of an answer."""
    code: int
    message: str
    goaway: bool


def _call(appliance, certificates):
    """Opens a connection, calls Control.Info as buildx does, and reads to the end."""
    directory = certificates.directory
    context = ssl.create_default_context(cafile=directory / "ca.crt")
    context.load_cert_chain(directory / "client.crt", directory / "client.key")
    context.set_alpn_protocols(["h2"])
    http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    http.initiate_connection()
    request = [(":method", "POST"), (":scheme", "https"), (":path", "/moby.buildkit.v1.Control/Info")]
    http.send_headers(1, [*request, (":authority", "localhost"), ("content-type", "application/grpc")])
    http.send_data(1, b"\0\0\0\0\0", end_stream=True)
    events, silence, begun = [], None, time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", appliance.ports["gateway"]), timeout=FIRST + SLACK) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(http.data_to_send())
        while data := tls.recv(65536):
            silence = silence or time.monotonic() - begun
            events += http.receive_data(data)
    (answer,) = (dict(event.headers) for event in events if isinstance(event, h2.events.ResponseReceived))
    goaway = any(isinstance(event, h2.events.ConnectionTerminated) for event in events)
    return Outcome(silence, int(answer["grpc-status"]), unquote(answer["grpc-message"]), goaway)


def _buildctl(appliance, certificates):
    gateway = f"tcp://localhost:{appliance.ports['gateway']}"
    return [appliance.tools["buildctl"], "--addr", gateway, *certificates.buildctl, "debug", "info"]


def _kill_worker(appliance):
    """Kills the worker, and waits until the appliance knows it."""
    (worker,) = appliance.workers()
    appliance.world.kill_worker(worker)
    eventually(lambda: appliance.pool()["members"][0]["failures"] == 1, "its end was seen")


def _admitted(appliance):
    """Returns how many connections have done their handshake and are admitted or ended."""
    metrics = appliance.metrics()
    handshakes = re.search(r'^buildkit_gateway_handshake_seconds_count\{outcome="ok"\} (\S+)', metrics, re.MULTILINE)
    pending = re.search(r"^buildkit_gateway_pending_connections (\S+)", metrics, re.MULTILINE)
    return float(handshakes[1]) - float(pending[1])


def _up(appliance):
    """An appliance whose only worker is leased and runs."""
    doorstep = DelayedStart(appliance)
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
        eventually(lambda: _admitted(appliance) >= before + 2, "both have a lease and no worker")
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
    doorstep, certificates = _up(appliance)
    builder = appliance.builder(certificates, "lost")
    doorstep.break_()
    _kill_worker(appliance)
    built = appliance.build(builder, context.dockerfile("say never"))
    assert built.code != 0
    assert "the lease ended because its worker failed" in built.text
    assert "the disk is missing" in built.text
    assert "bkpool allocate" in built.text
    assert built.seconds < FIRST, built.text


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
            calls = clients.submit(lambda: [_call(appliance, certificates) for _ in range(3)])
            buildx = clients.submit(appliance.build, builder, path)
            command = _buildctl(appliance, certificates)
            buildctl = clients.submit(lambda: [run(*command, env=appliance.env) for _ in range(3)])
        yield Waits(calls.result(), buildx.result(), buildctl.result())
    finally:
        appliance.finish()


def test_a_held_client_gets_nothing_until_its_time_is_over_and_then_status_and_goaway(waits):
    """Code 14 after 15 s, then code 9 after 12 s, then code 9 after 2 s. Each message has the cause."""
    first, second, later = waits.calls
    assert FIRST <= first.silence < FIRST + SLACK
    assert SECOND <= second.silence < SECOND + SLACK
    assert LATER <= later.silence < LATER + SLACK
    assert [outcome.code for outcome in waits.calls] == [UNAVAILABLE, FAILED_PRECONDITION, FAILED_PRECONDITION]
    assert all(outcome.goaway and CAUSE in outcome.message for outcome in waits.calls)
    assert "is not ready yet" in first.message
    assert "did not become ready in time" in second.message


def test_buildx_shows_the_cause_well_under_a_minute(waits):
    """It waits twice without help, because the first refusal asks it to try again."""
    assert waits.buildx.code != 0
    assert "did not become ready in time" in waits.buildx.text
    assert CAUSE in waits.buildx.text
    assert "bkpool logs default-worker-0" in waits.buildx.text
    assert FIRST + SECOND <= waits.buildx.seconds < WELL_UNDER_A_MINUTE, waits.buildx.text


def test_buildctl_shows_the_refusal_of_its_first_wait(waits):
    """It calls once. Before it shows the answer, it waits again to send its traces: 15 s + 12 s, later 2 s + 2 s."""
    first, second, later = waits.buildctl
    assert all(answer.code != 0 and CAUSE in answer.err for answer in waits.buildctl)
    assert "Unavailable: worker default/default-worker-0 is not ready yet" in first.err
    assert FIRST <= first.seconds < WELL_UNDER_A_MINUTE, first.err
    for answer in (second, later):
        assert "FailedPrecondition: worker default/default-worker-0 did not become ready in time" in answer.err
        assert LATER <= answer.seconds < FIRST, answer.err
