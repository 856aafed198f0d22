"""The table that is built from pools and workers: which leases have an endpoint, wait, or have ended."""

from __future__ import annotations

from datetime import timedelta

import pytest

from bkpool.core.errors import Gone, WorkerFailed
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolGateway, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndedLease, EndReason, Phase, new_worker
from bkpool.gateway.session.lease_table import build_lease_table

POOL = Pool(
    metadata=Metadata(name="p", uid="pool-uid"),
    spec=PoolSpec(gateway=PoolGateway(drain_timeout=timedelta(minutes=5))),
)


@pytest.fixture
def worker(worker_lease):
    worker = new_worker(Slot("default", "p", 0), POOL, worker_lease, {})
    worker = worker.but(metadata=worker.metadata.but(uid="worker-uid"))
    return worker.with_status(phase=Phase.ALLOCATED, endpoint="unix:///run/w", cache_owner=worker_lease.owner)


def route_of(worker, pools=(POOL,)):
    [route] = build_lease_table(pools, [worker]).routes.values()
    return route


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
    table = build_lease_table([POOL], [worker.with_lease(None).with_status(ended=(ended,))])
    assert not table.routes
    error = table.past["d"].end_error()
    assert isinstance(error, WorkerFailed)
    assert error.message == "the lease ended because its worker failed: it died"


def test_a_worker_of_a_deleted_pool_keeps_its_lease(worker):
    assert route_of(worker, pools=()).drain_timeout == 3600


def test_the_table_cannot_be_changed(worker):
    table = build_lease_table([POOL], [worker])
    with pytest.raises(TypeError):
        table.routes["x"] = None


def test_the_table_has_the_names_of_the_pools(worker):
    assert build_lease_table([POOL], [worker]).pools == {Key("default", "p")}
    assert build_lease_table([], [worker]).pools == frozenset()
