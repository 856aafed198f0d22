"""A worker of which nothing is heard is reported once, and that it is heard again, if the store says it is silent."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolGateway
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.net.relay import WorkerBytes
from bkpool.gateway.session.lease_table import leases_of
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.worker_silence import Report, WorkerSilence
from bkpool.store.sqlite import SqliteStore
from support.objects import lease, worker

LIMITS = GatewayLimits()
FIRST_BYTE, QUIET, INTERVAL = LIMITS.worker_first_byte, LIMITS.worker_quiet, LIMITS.report_interval
NOW = 1000.0


@pytest.fixture
def silence():
    return WorkerSilence(LIMITS)


def test_a_worker_that_sends_bytes_is_not_reported(silence):
    assert silence.look(NOW, []) is None
    for second in range(100):
        assert silence.look(NOW + second, [WorkerBytes(NOW, NOW + second - QUIET + 0.1)]) is None


def test_one_that_falls_silent_is_reported_once_until_a_byte_has_come(silence):
    connection = WorkerBytes(NOW, NOW)
    assert silence.look(NOW + QUIET, [connection]) == Report(QUIET)
    assert [silence.look(NOW + QUIET + second, [connection]) for second in range(3600)] == [None] * 3600
    connection.received_at = NOW + 3600
    assert silence.look(NOW + 3600 + QUIET, [connection]) == Report(QUIET)


def test_one_that_says_nothing_to_a_new_client_is_reported_soon(silence):
    assert silence.look(NOW + FIRST_BYTE - 0.1, [WorkerBytes(NOW)]) is None
    assert silence.look(NOW + FIRST_BYTE, [WorkerBytes(NOW)]) == Report(FIRST_BYTE)
    assert silence.look(NOW + 2 * FIRST_BYTE, [WorkerBytes(NOW)]) is None


def test_a_byte_to_one_connection_is_a_sign_of_life_for_all(silence):
    assert silence.look(NOW + 60, [WorkerBytes(NOW), WorkerBytes(NOW, NOW + 60 - QUIET + 0.1)]) is None


def test_one_that_cannot_be_dialled_is_reported_and_not_at_each_try(silence):
    tries = [silence.unreachable(NOW + 0.5 * number) for number in range(20)]
    assert tries.count(Report(0.0)) == 2
    assert tries[0] == Report(0.0)


def test_a_report_that_failed_is_made_again(silence):
    assert silence.look(NOW + QUIET, [WorkerBytes(NOW, NOW)])
    silence.not_reported()
    assert silence.look(NOW + QUIET + 2, [WorkerBytes(NOW, NOW)]) == Report(QUIET + 2)


def test_bytes_of_a_worker_that_is_noted_as_silent_are_reported_but_only_later_ones_and_not_too_often(silence):
    silence.noted(NOW, silent=True)
    assert silence.look(NOW + 1, [WorkerBytes(NOW - 60, NOW)]) is None, "it came before"
    assert silence.look(NOW + 60, [WorkerBytes(NOW + 58)]) is None, "none came at all"
    reports = []
    for second in range(60):
        silence.noted(NOW + second, silent=True)  # the controller writes it again each time
        reports.append(silence.look(NOW + second + 1, [WorkerBytes(NOW, NOW + second + 1)]))
    assert reports[0] == Report(None)
    assert reports.count(Report(None)) == 60 / INTERVAL
    silence.noted(NOW + 60, silent=False)
    assert silence.look(NOW + 61, [WorkerBytes(NOW, NOW + 61)]) is None


# --- a whole gateway ------------------------------------------------------------------------------------------------


async def test_a_gateway_reports_a_worker_that_falls_silent_and_that_its_bytes_come_again(new_world):
    world = await new_world()
    client = await world.connect(world.lease())
    client.writer.write(b"ping")
    assert await client.reader.readexactly(4) == b"ping"
    for _ in range(5):
        await world.advance(2)
    await world.wait_until(lambda: len(world.registry.silences) == 1)
    assert QUIET <= world.registry.silences[0] < 2 * QUIET
    world.lease(silent=True)
    await world.advance(1)
    client.writer.write(b"pong")
    assert await client.reader.readexactly(4) == b"pong"
    await world.advance(2)
    await world.advance(INTERVAL)
    await world.wait_until(lambda: world.registry.silences[1:2] == [None])


async def test_a_gateway_reports_a_worker_that_it_cannot_dial(new_world, tmp_path):
    world = await new_world()
    await world.connect(world.lease(endpoint=f"unix://{tmp_path}/nobody"))
    await world.wait_until(lambda: world.registry.silences == [0.0])


# --- in the store ---------------------------------------------------------------------------------------------------


async def test_what_a_gateway_reports_is_written_on_the_worker_and_never_on_a_later_daemon(tmp_path):
    now = datetime.now(UTC)
    store = await SqliteStore.open(tmp_path / "state.db")
    await store.create(Pool(metadata=Metadata(name="p")))
    one = worker(0, lease(now=now), phase=Phase.ALLOCATED, cache_owner="owner-a")
    made = await store.create(one.but(metadata=one.metadata.but(resource_version="", uid="")))
    await store.replace_status(made.but(status=one.status))
    registry = StoreLeaseRegistry(store, "g", lambda: now, lambda _worker: None)

    async def stored() -> Worker:
        return await store.get(Worker, *Key("default", "p-worker-0"))

    route = leases_of(await stored(), PoolGateway()).route
    assert not route.silent
    await registry.report_worker(route, None)
    unchanged = (await stored()).metadata.resource_version
    await registry.report_worker(route, 6.0)
    silent = await stored()
    assert silent.status.silent_since == now - timedelta(seconds=6)
    assert leases_of(silent, PoolGateway()).route.silent
    await registry.report_worker(route, 0.0)
    assert (await stored()).metadata.resource_version == silent.metadata.resource_version, "there is nothing to write"
    assert silent.metadata.resource_version != unchanged
    await registry.report_worker(route, None)
    assert (await stored()).status.silent_since is None
    await store.replace_status((await stored()).with_status(endpoint="unix:///new"))
    await registry.report_worker(route, 6.0)
    assert (await stored()).status.silent_since is None, "this was about the daemon before"
    await store.close()


async def test_of_300_reports_at_once_few_are_written_at_once(tmp_path):
    """As when a node is lost."""

    class SlowStore:
        under_way = most = 0

        async def get(self, *_key: object) -> Worker:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(0)
            self.under_way -= 1
            return worker(0, lease())

    store, now = SlowStore(), datetime.now(UTC)
    registry = StoreLeaseRegistry(store, "g", lambda: now, lambda _worker: None)
    route = leases_of(worker(0, lease()), PoolGateway()).route
    await asyncio.gather(*(registry.report_worker(route, None) for _ in range(300)))
    assert store.most <= 8
