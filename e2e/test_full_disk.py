"""A real appliance whose home is on a small disk that fills up, and gets room again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Appliance, eventually, only_on
from support.small_disk import fill, make_room, small_disk

pytestmark = only_on("process", "in a cluster the appliance stores nothing on its own disk")

MORE_THAN_A_LEASE_SURVIVES = 2 * 5
"""Failed attempts for two workers, each of which would lose its lease after five failed starts."""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "64m") as disk:
        yield disk


@pytest.fixture
def full_soon(disk, tmp_path, tools, world) -> Iterator[Appliance]:
    appliance = Appliance(tmp_path / "full", tools, world=world)
    appliance.home = disk
    yield appliance
    (disk / "fill").unlink(missing_ok=True)
    appliance.finish()


def refused(appliance: Appliance, *command: str) -> None:
    answer = appliance.cli(*command)
    assert answer.code == 73, answer.text
    assert "the file system" in answer.text
    assert "is full" in answer.text
    assert "hint: Free some space there" in answer.text


def failed_attempts(appliance: Appliance) -> float:
    """How often the controller could not start a worker, or not even write that it has ended."""
    lines = appliance.metrics().splitlines()
    actions = [line for line in lines if re.match(r'buildkit_controller_actions_total\{action="(start|write)_', line)]
    return sum(float(line.split()[-1]) for line in actions if 'result="failed"' in line)


def ready(appliance: Appliance) -> tuple[int, str]:
    status, answer = appliance.http("GET", "/ready")
    return status, str(answer)


def test_writes_end_with_the_sentence_reads_go_on_no_lease_is_lost_and_it_heals(full_soon, disk, context) -> None:
    appliance = full_soon
    appliance.up_with({"scaling": {"min": 1, "max": 3}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "before")
    fill(disk)

    refused(appliance, "allocate")
    assert appliance.http("POST", "/api/v1/workers/allocate", {"poolName": "default"})[0] == 507
    assert "is full" in ready(appliance)[1]
    assert ready(appliance)[0] == 503
    assert appliance.cli("status").ok().json["pools"]
    assert appliance.http("GET", "/health")[0] == 200
    for worker in appliance.workers():  # none comes back before there is room
        appliance.world.kill_worker(worker)
    eventually(lambda: failed_attempts(appliance) > MORE_THAN_A_LEASE_SURVIVES, "starts fail")
    assert not appliance.workers()

    make_room(disk)
    eventually(lambda: ready(appliance)[0] == 200, "it is ready")
    lease = appliance.cli("allocate").ok().json
    appliance.release(lease).ok()
    appliance.build(builder, context.dockerfile("say as-before")).ok()  # with the lease of before
    assert '"lease.lost"' not in appliance.log


@pytest.mark.parametrize("options", [(), ("--now",)])
def test_down_ends_on_a_full_disk(full_soon, disk, options) -> None:
    full_soon.up_with({"scaling": {"min": 1}})
    full_soon.cli("allocate").ok()
    fill(disk)
    assert full_soon.cli("down", *options).ok().json["stopped"]
    assert not full_soon.daemons()


def test_up_on_a_full_disk_says_so_and_works_with_room(full_soon, disk) -> None:
    fill(disk)
    refused(full_soon, "up", "-d", *full_soon.world.options(), *full_soon.addresses)
    make_room(disk)
    full_soon.up()


def test_up_takes_over_its_workers_on_a_full_disk(full_soon, disk) -> None:
    full_soon.up_with({"scaling": {"min": 1}})
    lease = full_soon.cli("allocate").ok().json
    full_soon.kill()
    fill(disk)
    answer = full_soon.cli("up", "-d", *full_soon.world.options(), *full_soon.addresses)
    assert answer.code in {0, 73}, answer.text  # what the killed one leaves may be room enough
    make_room(disk)
    full_soon.up()
    assert full_soon.cli("renew", "--token", lease["token"]).ok()
