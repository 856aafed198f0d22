"""What the table has of one worker: which of its leases has an endpoint, waits, or has ended."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import timedelta

import pytest

from bkpool.core.errors import Gone, WorkerFailed
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolGateway, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndedLease, EndReason, Phase, new_worker
from bkpool.gateway.session.lease_table import LeaseTable, TableChange, WorkerLeases, leases_of

POOL = Pool(
    metadata=Metadata(name="p", uid="pool-uid"),
    spec=PoolSpec(gateway=PoolGateway(drain_timeout=timedelta(minutes=5))),
)


@pytest.fixture
def worker(worker_lease):
    worker = new_worker(Slot("default", "p", 0), POOL, worker_lease, {})
    worker = worker.but(metadata=worker.metadata.but(uid="worker-uid"))
    return worker.with_status(phase=Phase.ALLOCATED, endpoint="unix:///run/w", cache_owner=worker_lease.owner)


def route_of(worker):
    return leases_of(worker, POOL.spec.gateway).route


def test_a_ready_worker_has_an_endpoint(worker, now):
    route = route_of(worker)
    assert route.endpoint == "unix:///run/w"
    assert route.worker == Key("default", "p-worker-0")
    assert route.worker_uid == "worker-uid"
    assert route.pool == Key("default", "p")
    assert route.expires_at == (now + timedelta(hours=1)).timestamp()
    assert route.drain_timeout == 300
    assert route.end_error(route.expires_at - 0.001) is None
    assert isinstance(route.end_error(route.expires_at), Gone)


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": Phase.PROVISIONING},
        {"phase": Phase.PENDING},
        {"phase": Phase.FAILED},
        {"phase": Phase.TERMINATING},
        {"endpoint": None},
        {"cache_owner": None},
        {"cache_owner": "another"},
    ],
)
def test_a_worker_that_is_not_ready_for_this_owner_has_no_endpoint(worker, changes):
    route = route_of(worker.with_status(**changes))
    assert route.endpoint is None
    assert route.wait_reason == "its BuildKit daemon is being started"


def test_the_wait_reason_is_the_workers_message(worker):
    assert route_of(worker.with_status(endpoint=None, message="disk full")).wait_reason == "disk full"


def test_a_released_lease_has_ended_at_any_time(worker, worker_lease, now):
    ended = worker_lease.but(ended_at=now, end_reason=EndReason.RELEASED)
    route = route_of(worker.with_lease(ended).with_status(phase=Phase.DRAINING))
    assert route.end_error(0.0).code == "LeaseReleased"


def test_a_lease_that_no_longer_holds_its_worker_is_remembered(worker, now):
    ended = EndedLease(token_sha256="d", ended_at=now, reason=EndReason.LOST, message="it died")
    leases = leases_of(worker.with_lease(None).with_status(ended=(ended,)), POOL.spec.gateway)
    assert leases.route is None
    error = leases.past["d"].end_error()
    assert isinstance(error, WorkerFailed)
    assert error.message == "the lease ended because its worker failed: it died"


def test_what_crosses_threads_cannot_be_changed(worker):
    leases = leases_of(worker, POOL.spec.gateway)
    with pytest.raises(TypeError):
        leases.past["x"] = None
    with pytest.raises(FrozenInstanceError):
        leases.route = None


def test_a_change_concerns_the_leases_that_its_workers_have_or_had(worker, worker_lease):
    ended = EndedLease(token_sha256="past", ended_at=worker_lease.allocated_at, reason=EndReason.LOST)
    leases = leases_of(worker.with_status(ended=(ended,)), POOL.spec.gateway)
    other = leases_of(worker.with_lease(worker_lease.but(token_sha256="other")), POOL.spec.gateway)
    table, pools = LeaseTable(), frozenset({POOL.key})
    assert table.apply(TableChange({Key("default", "p-worker-1"): other}, pools)) == {"other"}
    assert table.apply(TableChange({worker.key: leases}, pools)) == {worker_lease.token_sha256, "past"}
    assert table.apply(TableChange({worker.key: WorkerLeases()}, pools)) == {worker_lease.token_sha256, "past"}
    assert table.apply(TableChange({}, pools)) == frozenset()
