"""Clients that ask for nothing, at an appliance that may open few files: a user notices nothing of them."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest

from harness import only_on, run

pytestmark = only_on("process", "the limit of open files is that of a process on this machine")

HALF_REQUESTS, BARE_CONNECTIONS = 1100, 1010
LIMIT = 1024
"""Open files of the appliance: what most systems give a program, and fewer than the attackers have connections."""
AT_START = 512
"""The soft limit with which the appliance is started. It raises its own, and not that of its workers."""
HALF = b"POST /api/v1/workers/allocate HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(autouse=True)
def _room_for_the_attackers() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def flood(port: int, count: int, sent: bytes) -> Iterator[None]:
    """Opens this many connections from four addresses, and sends these bytes on each."""
    with contextlib.ExitStack() as stack:
        for number in range(count):
            source = (f"127.0.0.{number % 4 + 1}", 0)
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=source))
            with contextlib.suppress(ConnectionError):  # closed already to make room
                one.sendall(sent)
        yield


def test_users_and_the_admin_are_served_beside_two_floods(make_appliance):
    appliance = make_appliance()
    appliance.program = ["prlimit", f"--nofile={AT_START}:{LIMIT}", *appliance.program]
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    appliance.all_idle()
    (shared,) = [event for event in appliance.events if event["event"] == "appliance.descriptors"]
    assert shared["limit"] == LIMIT
    assert shared["api"] + shared["gateway_pending"] + 2 * shared["gateway"] < LIMIT

    limits = [resource.prlimit(daemon, resource.RLIMIT_NOFILE) for daemon in appliance.daemons()]
    assert (AT_START, LIMIT) in limits, "what buildkitd is started with, and gives its steps"

    with flood(appliance.ports["api"], HALF_REQUESTS, HALF):
        with flood(appliance.ports["gateway"], BARE_CONNECTIONS, b""):
            assert appliance.pool()["workers"] == 1
            certificates = appliance.allocate()
            address = f"--addr=tcp://localhost:{appliance.ports['gateway']}"
            for _ in range(3):
                run(
                    appliance.tools["buildctl"],
                    address,
                    *certificates.buildctl,
                    *("debug", "workers"),
                    env=appliance.env,
                ).ok()
            appliance.cli("status").ok()
            assert appliance.metrics()
        assert appliance.release(certificates.lease).code == 0
    appliance.all_idle()
    assert "accept_paused" not in appliance.log
