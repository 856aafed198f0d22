"""What a change of the store's copy changes in the table of leases: only what it concerns, and nothing is missed."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolGateway, PoolSpec, PoolStatus
from bkpool.core.resource import Metadata
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import EndedLease, EndReason, PoolRef, Worker, WorkerSpec, WorkerStatus
from bkpool.gateway.control.lease_feed import AT_ONCE, LeaseFeed
from bkpool.gateway.control.table_feeder import TableFeeder
from bkpool.gateway.session.lease_table import LeaseTable, TableChange, WorkerLeases, leases_of, unreadable_leases
from bkpool.store import WatchEvent
from bkpool.store.mirror import Mirror
from support.examples import examples
from support.no_store import NoStore
from support.objects import NOW, lease

POOLS = [Key("default", "p"), Key("team", "p"), Key("default", "q")]
WORKERS = [Key(pool.namespace, f"{pool.name}-worker-{number}") for pool in POOLS for number in range(2)]
ODD = Key("default", "odd")
"""A worker whose name is that of no slot; nobody can read it."""
DIGESTS = ["a", "b", "c", "d"]


class Stored:
    """A copy of a store that nobody has. What a test puts in has ever higher versions."""

    def __init__(self) -> None:
        self.mirror = Mirror(NoStore())
        self._version = 0

    def put(self, found: Pool | Worker | Unreadable) -> None:
        self._version += 1
        if isinstance(found, Unreadable):
            metadata = {**found.document.get("metadata", {}), "resourceVersion": str(self._version)}
            self.mirror.apply(
                Unreadable(found.kind, found.key, found.reason, {**found.document, "metadata": metadata})
            )
        else:
            self.mirror.apply(found.but(metadata=found.metadata.but(resource_version=str(self._version))))

    def remove(self, kind: type[Pool | Worker], key: Key) -> None:
        copy = self.mirror._pools if kind is Pool else self.mirror._workers
        found = copy.readable.get(key) or copy.unreadable.get(key)
        if found is not None:
            self._version += 1
            if isinstance(found, Unreadable):
                metadata = {**found.document["metadata"], "resourceVersion": str(self._version)}
                last = Unreadable(kind, key, found.reason, {**found.document, "metadata": metadata})
            else:
                last = found.but(metadata=found.metadata.but(resource_version=str(self._version)))
            copy.event(WatchEvent("DELETED", last))


def pool(key: Key, drain: int = 60, message: str = "") -> Pool:
    spec = PoolSpec(gateway=PoolGateway(drain_timeout=timedelta(seconds=drain)))
    status = PoolStatus(observed_generation=len(message))
    return Pool(metadata=Metadata(name=key.name, namespace=key.namespace), spec=spec, status=status)


def worker(key: Key, leased: str | None = None, ended: tuple[str, ...] = ()) -> Worker:
    past = tuple(EndedLease(token_sha256=one, ended_at=NOW, reason=EndReason.LOST, message=str(key)) for one in ended)
    allocation = lease(id=f"{leased}-{key}", token_sha256=leased) if leased else None
    return Worker(
        metadata=Metadata(name=key.name, namespace=key.namespace),
        spec=WorkerSpec(pool_ref=PoolRef(name=key.name.partition("-")[0]), allocation=allocation),
        status=WorkerStatus(ended=past),
    )


def broken(kind: type[Pool | Worker], key: Key, leased: str = "", of: str = "") -> Unreadable:
    spec = {"allocation": {"tokenSHA256": leased}, "poolRef": {"name": of}}
    return Unreadable(kind, key, "spec: is wrong", {"spec": spec})


@pytest.fixture
def stored():
    one = Stored()
    one.put(pool(POOLS[0]))
    one.put(pool(POOLS[2]))
    for key in (*WORKERS[:2], *WORKERS[4:]):
        one.put(worker(key, ended=("past",)))
    return one


@pytest.fixture
def feed(stored):
    feed = LeaseFeed(stored.mirror)
    stored.mirror.subscribe(feed.note)
    feed.take()
    return feed


def test_the_first_change_has_everything(stored):
    stored.put(broken(Worker, WORKERS[2], "a"))
    stored.put(broken(Worker, ODD, "b", of="p"))
    first = LeaseFeed(stored.mirror).take()
    assert first.workers.keys() == {*WORKERS[:3], *WORKERS[4:], ODD}
    assert first.pools == {POOLS[0], POOLS[2]}


def test_the_leases_of_a_large_pool_come_in_parts_and_other_changes_before_them(stored):
    large = [Key("default", f"p-worker-{number}") for number in range(3 * AT_ONCE)]
    for key in large:
        stored.put(worker(key, f"lease-{key.name}"))
    feed = LeaseFeed(stored.mirror)
    stored.mirror.subscribe(feed.note)
    while feed.has_more:
        feed.take()
    stored.put(pool(POOLS[0], drain=61))
    parts = [feed.take()]
    stored.put(worker(WORKERS[4], "other"))
    while feed.has_more:
        parts.append(feed.take())
    assert all(len(part.workers) <= AT_ONCE for part in parts)
    assert WORKERS[4] in parts[1].workers
    routes = [leases.route for part in parts for key, leases in part.workers.items() if key in large]
    assert {route.worker: route.drain_timeout for route in routes} == dict.fromkeys(large, 61)
    assert len(routes) == len(large), "each of them once"


async def test_the_gateway_gets_all_parts_until_the_feed_is_ended(stored):
    for number in range(3 * AT_ONCE):
        stored.put(worker(Key("default", f"p-worker-{number}"), f"lease-{number}"))
    got: list[Key] = []
    for parts in (2, 10):
        got.clear()
        end = TableFeeder(stored.mirror).start(lambda change: got.extend(change.workers))
        for _ in range(parts - 1):
            await asyncio.sleep(0)
        end()
        await asyncio.sleep(0)
        assert len(got) == min(parts * AT_ONCE, 3 * AT_ONCE + 2)


def leased(count: int) -> list[Worker]:
    return [worker(Key("default", f"p-worker-{number}"), f"lease-{number}") for number in range(count)]


async def test_all_leases_are_there_when_the_feeder_is_complete(stored):
    for one in leased(3 * AT_ONCE):
        stored.put(one)
    got: list[Key] = []
    feeder = TableFeeder(stored.mirror)
    end = feeder.start(lambda change: got.extend(change.workers))
    assert not feeder.complete.is_set()
    await feeder.complete.wait()
    assert len(got) == 3 * AT_ONCE + 2
    end()


async def test_a_lease_that_somebody_waits_for_is_handed_on_at_once(stored):
    table = LeaseTable()
    feeder = TableFeeder(stored.mirror)
    end = feeder.start(table.apply)
    for one in leased(3 * AT_ONCE):
        stored.put(one)
    stored.put(worker(WORKERS[4], ended=("just over",)))
    stored.put(broken(Worker, ODD, "unreadable", of="p"))
    last = f"lease-{3 * AT_ONCE - 1}"
    assert not any((*answers(table, last), *answers(table, "just over"), *answers(table, "unreadable")))
    assert all(feeder.hand_on(digest) for digest in (last, "just over", "unreadable"))
    assert table.route(last)
    assert table.past("just over")
    assert table.unreadable("unreadable")
    assert not feeder.hand_on("nobody's")
    end()
    stored.put(worker(WORKERS[5], "late"))
    assert feeder.hand_on("late")
    assert not table.route("late"), "the gateway is being closed"


@pytest.mark.slow
@pytest.mark.any_python
@pytest.mark.parametrize("how", ["revoked", "its worker is gone", "its worker has another lease"])
def test_a_lease_that_has_ended_comes_before_all_other_changes(stored, feed, how):
    many = leased(3000)
    one = worker(WORKERS[4], "ends")
    for found in (*many, one):
        stored.put(found)
    while feed.has_more:
        feed.take()
    for found in many:
        stored.put(found)
    if how == "revoked":
        stored.put(one.with_lease(one.lease.but(ended_at=NOW, end_reason=EndReason.REVOKED)))
    elif how == "its worker is gone":
        stored.remove(Worker, one.key)
    else:
        stored.put(worker(one.key, "next"))
    stored.put(many[0])
    assert one.key in feed.take().workers


def test_a_lease_that_drains_comes_first_when_it_is_revoked(stored, feed):
    one = worker(WORKERS[4], "ends")
    many = leased(3 * AT_ONCE)
    stored.put(one.with_lease(one.lease.but(ended_at=NOW, end_reason=EndReason.RELEASED)))
    feed.take()
    for found in many:
        stored.put(found)
    stored.put(one.with_lease(one.lease.but(ended_at=NOW, end_reason=EndReason.REVOKED)))
    assert feed.take().workers[one.key].route.revoked


def test_an_empty_store_changes_nothing():
    assert LeaseFeed(Stored().mirror).take() is None


def test_a_burst_gives_one_change_with_the_workers_concerned(stored, feed):
    stored.put(worker(WORKERS[0], "a"))
    stored.put(worker(WORKERS[0], "b"))
    stored.put(broken(Worker, WORKERS[1]))
    change = feed.take()
    assert change.workers.keys() == {*WORKERS[:2]}
    assert change.workers[WORKERS[0]].digests == {"b"}
    assert feed.take() is None


def test_a_worker_that_is_gone_has_nothing(stored, feed):
    stored.remove(Worker, WORKERS[0])
    assert feed.take().workers == {WORKERS[0]: WorkerLeases()}


def test_a_pools_drain_timeout_concerns_its_leased_workers_and_its_status_none(stored, feed):
    stored.put(pool(POOLS[0], message="12 workers"))
    assert feed.take() is None
    stored.put(worker(WORKERS[0], "a"))
    feed.take()
    stored.put(pool(POOLS[0], drain=61))
    change = feed.take()
    assert change.workers.keys() == {WORKERS[0]}
    assert change.workers[WORKERS[0]].route.drain_timeout == 61


@pytest.mark.parametrize("how", ["deleted", "cannot be read"])
def test_the_workers_of_a_pool_that_is_gone_keep_their_leases_with_the_default_drain_timeout(stored, feed, how):
    stored.put(worker(WORKERS[0], "a"))
    feed.take()
    if how == "deleted":
        stored.remove(Pool, POOLS[0])
    else:
        stored.put(broken(Pool, POOLS[0]))
    change = feed.take()
    assert change.workers[WORKERS[0]].route.drain_timeout == 3600
    assert (POOLS[0] in change.pools) == (how != "deleted"), "a name of its Service still needs a lease of it"


def test_an_unreadable_worker_in_no_slot_is_looked_at_until_it_is_gone(stored, feed):
    stored.put(broken(Worker, ODD, "a", of="p"))
    assert feed.take().workers[ODD].digests == {"a"}
    stored.put(broken(Worker, ODD))  # nobody knows its pool, so the mirror says nothing of it
    assert feed.take().workers[ODD].digests == frozenset()
    stored.remove(Worker, ODD)
    assert feed.take().workers == {ODD: WorkerLeases()}
    assert feed.take() is None


digests = st.sampled_from(DIGESTS)
keys = st.sampled_from(WORKERS)
pools = st.sampled_from(POOLS)
steps = st.one_of(
    st.builds(worker, keys, st.none() | digests, st.lists(digests, max_size=2, unique=True).map(tuple)),
    st.builds(broken, st.just(Worker), keys, st.sampled_from(["", *DIGESTS])),
    st.builds(broken, st.just(Worker), st.just(ODD), digests, st.sampled_from(["", "p", "q"])),
    st.tuples(st.just(Worker), keys | st.just(ODD)),
    st.builds(pool, pools, st.sampled_from([60, 61]), st.sampled_from(["", "message"])),
    st.builds(broken, st.just(Pool), pools),
    st.tuples(st.just(Pool), pools),
    st.none(),  # the burst ends
)


def expected(mirror: Mirror) -> TableChange:
    """Everything that a table must have, without a feed."""
    workers = {found.key: unreadable_leases(found) for found in mirror.unreadable_workers.values()}
    for one in mirror.workers.values():
        its_pool = mirror.pools.get(one.pool)
        workers[one.key] = leases_of(one, its_pool.spec.gateway if its_pool else PoolGateway())
    return TableChange(workers, frozenset({*mirror.pools, *mirror.unreadable_pools}))


def look_up(change: TableChange, digest: str) -> tuple[object, object, object]:
    """What a table with these workers answers, without a table: if several have the digest, the first by name."""
    leases = [found for _, found in sorted(change.workers.items())]
    routes = [one.route for one in leases if one.route and one.route.token_sha256 == digest]
    past = [one.past[digest] for one in leases if digest in one.past]
    unreadable = [one.unreadable for one in leases if one.unreadable and one.unreadable.token_sha256 == digest]
    return next(iter(routes), None), next(iter(past), None), next(iter(unreadable), None)


def answers(table: LeaseTable, digest: str) -> tuple[object, object, object]:
    return table.route(digest), table.past(digest), table.unreadable(digest)


@given(before=st.lists(steps, max_size=10), after=st.lists(steps, max_size=40))
@settings(max_examples=examples(300), deadline=None, derandomize=True)
def test_a_table_that_follows_changes_is_the_table_made_from_scratch(before, after):
    stored = Stored()
    feed: LeaseFeed | None = None
    table = LeaseTable()
    for number, step in enumerate([*before, None, *after, None]):
        if isinstance(step, tuple):
            stored.remove(*step)
        elif step is not None:
            stored.put(step)
        elif number >= len(before):
            if feed is None:
                feed = LeaseFeed(stored.mirror)
                stored.mirror.subscribe(feed.note)
            was = {digest: answers(table, digest) for digest in DIGESTS}
            change = feed.take()
            concerned = frozenset() if change is None else table.apply(change)
            must = expected(stored.mirror)
            for digest in DIGESTS:
                assert answers(table, digest) == look_up(must, digest)
                assert digest in concerned or was[digest] == answers(table, digest)
            assert [table.can_be_read(key) for key in WORKERS] == [
                key not in stored.mirror.unreadable_workers for key in WORKERS
            ]
            assert table.pools == must.pools
            scratch = LeaseTable()
            scratch.apply(must)
            assert (table._workers, table._holders) == (scratch._workers, scratch._holders), "nothing is left over"
