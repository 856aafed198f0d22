"""The mirror against a real store, and against one that can be cut off."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.claim_order import Request
from bkpool.core.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from bkpool.core.names import LABEL_REQUEST, Key, Slot
from bkpool.core.pool import Pool, PoolStatus, Scaling
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker, new_worker
from bkpool.store.mirror import Mirror, MirrorChange
from bkpool.store.sqlite import SqliteStore
from support.captured_logs import capture_logs
from support.objects import lease
from support.unreadable import spoil

P, Q = Key("default", "p"), Key("default", "q")


def a_pool(name: str = "p") -> Pool:
    return Pool(metadata=Metadata(name=name))


def scaled(pool: Pool, maximum: int) -> Pool:
    return pool.but(spec=pool.spec.but(scaling=Scaling(max=maximum)))


class Cut:
    """The store behind a connection that the test can cut."""

    def __init__(self, store) -> None:
        self._store = store
        self.cut = False
        self.silent = False
        self.refusal: Exception | None = None
        self.lists = 0

    async def list(self, kind, **narrowed):
        self.lists += 1
        if self.cut:
            raise Unavailable("the wire is cut")
        if self.refusal:
            raise self.refusal
        return await self._store.list(kind, **narrowed)

    async def watch(self, kind, since, **narrowed):
        if self.silent:
            raise Unavailable("nothing can be followed")
        async for event in self._store.watch(kind, since, **narrowed):
            if self.cut:
                raise Unavailable("the wire is cut")
            yield event

    def __getattr__(self, name):
        return getattr(self._store, name)


@asynccontextmanager
async def running(store, **options):
    """A mirror that has listed everything."""
    mirror = Mirror(store, **options)
    task = asyncio.create_task(mirror.run())
    try:
        async with asyncio.timeout(60):
            await mirror.ready.wait()
        yield mirror
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def until(mirror: Mirror, condition) -> None:
    changed = asyncio.Event()
    unsubscribe = mirror.subscribe(lambda _pool: changed.set())
    async with asyncio.timeout(60):
        while not condition():
            changed.clear()
            await changed.wait()
    unsubscribe()


async def test_it_starts_with_the_existing_objects_and_follows_every_change(store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))

    async with running(store) as mirror:
        assert mirror.pools == {P: pool}
        assert mirror.workers == {worker.key: worker}

        other = await store.create(a_pool("q"))
        worker = await store.replace_status(worker.with_status(failures=1))
        await until(mirror, lambda: Q in mirror.pools and mirror.workers[worker.key] == worker)
        await store.delete(Pool, *P)
        await until(mirror, lambda: not mirror.workers and mirror.pools == {Q: other})


async def test_workers_of_a_pool_are_only_that_pools_workers(store):
    pool, other = await store.create(a_pool()), await store.create(a_pool("q"))
    async with running(store) as mirror:
        mine = [await store.create(new_worker(Slot("default", "p", n), pool, None, {})) for n in range(2)]
        await store.create(new_worker(Slot("default", "q", 0), other, None, {}))
        await until(mirror, lambda: len(mirror.workers) == 3)

        assert sorted(mirror.workers_of(P), key=lambda w: w.slot) == mine
        assert mirror.workers_of(Key("default", "unknown")) == []
        changed = await store.replace_status(mine[0].with_status(failures=3))
        await until(mirror, lambda: changed in mirror.workers_of(P))
        await store.delete(type(changed), *changed.key)
        await until(mirror, lambda: mirror.workers_of(P) == [mine[1]])
        assert list(mirror.index_of(P).workers.values()) == [mine[1]]


async def test_the_index_of_a_pool_goes_when_the_pool_and_its_workers_are_gone(store):
    async with running(store) as mirror:
        pool = await store.create(a_pool())
        await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
        await until(mirror, lambda: mirror.index_of(P).counts.workers == 1)
        await store.delete(Pool, *P)  # and its worker with it
        await until(mirror, lambda: not mirror.workers and not mirror.pools)
        assert mirror.index_of(P).counts.workers == 0
        assert mirror._indexes == {}


async def test_subscribers_get_what_has_changed_until_they_unsubscribe(store):
    pool = await store.create(a_pool())
    async with running(store) as mirror:
        reported: list[MirrorChange] = []
        unsubscribe = mirror.subscribe(reported.append)

        mirror.apply(await store.create(a_pool("q")))
        mirror.apply(await store.create(new_worker(Slot("default", "p", 0), pool, None, {})))
        assert reported == [MirrorChange(Q), MirrorChange(P, Slot("default", "p", 0))]

        unsubscribe()
        unsubscribe()
        mirror.apply(await store.create(new_worker(Slot("default", "p", 1), pool, None, {})))
        assert len(reported) == 2


async def test_a_writer_sees_its_own_write_at_once_and_is_called_back_once(store):
    pool = await store.create(a_pool())
    async with running(store) as mirror:
        reported: list[Key] = []
        mirror.subscribe(lambda change: reported.append(change.pool))
        changed = await store.replace(scaled(pool, 3))
        mirror.apply(changed)
        assert mirror.pools[P] == changed

        await store.create(a_pool("q"))
        await until(mirror, lambda: Q in mirror.pools)
        assert reported == [P, Q]


async def test_apply_ignores_an_older_version(store):
    pool = await store.create(a_pool())
    newer = await store.replace(scaled(pool, 3))
    async with running(store) as mirror:
        mirror.apply(pool)
        assert mirror.pools[P] == newer


async def test_apply_does_not_bring_back_an_object_that_was_deleted_since(store):
    async with running(store) as mirror:
        pool = await store.create(a_pool())
        await until(mirror, lambda: P in mirror.pools)
        changed = await store.replace(scaled(pool, 3))
        await store.delete(Pool, *P)
        await until(mirror, lambda: P not in mirror.pools)

        mirror.apply(changed)
        assert mirror.pools == {}


async def test_a_late_deletion_does_not_remove_an_object_that_was_created_again(store):
    made = await store.create(a_pool())
    mirror = Mirror(store)
    mirror.apply(made)
    await store.delete(Pool, *P)
    again = await store.create(a_pool())
    mirror.apply(again)

    async with aclosing(store.watch(Pool, made.metadata.resource_version)) as watch:
        deleted = await anext(watch)
    mirror._pools.event(deleted)

    assert deleted.type == "DELETED"
    assert mirror.pools == {P: again}


async def test_an_older_list_does_not_remove_an_applied_object(store):
    listing = await store.list(Pool)
    pool = await store.create(a_pool())
    mirror = Mirror(store)
    mirror.apply(pool)

    mirror._pools.listed(listing)

    assert mirror.pools == {P: pool}


async def test_after_an_expired_watch_it_lists_again_and_reports_what_was_deleted(tmp_path):
    store = await SqliteStore.open(tmp_path / "forgetful.db", history=3)
    wire = Cut(store)
    pool = await store.create(a_pool())
    doomed = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    resume, pauses = asyncio.Event(), []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await resume.wait()

    async with running(wire, pause=pause, jitter=lambda: 1.0) as mirror:
        wire.cut = True
        await store.delete(type(doomed), *doomed.key)
        pool = await store.replace_status(pool.but(status=PoolStatus(workers=1)))
        async with asyncio.timeout(60):
            while len(pauses) < 2:
                await store.list(Pool)
        for number in range(20, 30):
            pool = await store.replace(scaled(pool, number))
        assert mirror.workers, "the copy is out of date"
        reported: list[Key] = []
        mirror.subscribe(lambda change: reported.append(change.pool))
        wire.cut = False
        resume.set()
        await until(mirror, lambda: not mirror.workers and mirror.pools == {P: pool})
        assert reported.count(P) == 2
    await store.close()


async def test_an_unreachable_store_is_tried_ever_more_slowly_up_to_a_limit(store):
    wire = Cut(store)
    wire.cut = True
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 40:
            wire.cut = False
        await asyncio.sleep(0)

    async with running(wire, pause=pause, jitter=lambda: 0.5):
        pass
    assert wire.lists >= 42
    assert pauses[0] == pytest.approx(0.05)
    assert max(pauses) == pytest.approx(2.5)
    assert sorted(pauses) == pytest.approx(pauses), "each is longer than the one before, for both kinds together"


async def test_trouble_says_why_the_copy_may_be_out_of_date_until_it_has_listed_again(store):
    wire, resume = Cut(store), asyncio.Event()
    assert Mirror(wire).trouble == "the store has not been read yet"

    async def pause(_seconds: float) -> None:
        await resume.wait()

    async with running(wire, pause=pause) as mirror:
        assert mirror.trouble is None
        wire.cut = True
        pool = await store.create(a_pool())
        async with asyncio.timeout(60):
            while mirror.trouble is None:
                await store.list(Pool)
        assert mirror.trouble == "the wire is cut"
        assert mirror.ready.is_set(), "the copy can still be read"

        wire.cut = False
        resume.set()
        await until(mirror, lambda: mirror.pools == {P: pool})
        assert mirror.trouble is None


async def test_a_store_that_can_be_listed_but_not_watched_is_tried_ever_more_slowly(store):
    wire = Cut(store)
    wire.silent = True
    pauses: list[float] = []
    enough = asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 24:
            enough.set()
            wire.silent = False
        await asyncio.sleep(0)

    async with running(wire, pause=pause, jitter=lambda: 1.0), asyncio.timeout(60):
        await enough.wait()
    assert max(pauses) == pytest.approx(5.0)


@pytest.mark.parametrize("refusal", [Forbidden("no"), Unauthenticated("who"), NotFound("what")])
async def test_refusals_are_raised_at_first_and_retried_after_the_first_list(store, refusal):
    wire = Cut(store)
    wire.refusal = refusal
    with pytest.raises(ExceptionGroup) as died:
        await Mirror(wire).run()
    assert refusal in died.value.exceptions

    wire.refusal = None

    seen: list[str | None] = []

    async def pause(_seconds: float) -> None:
        seen.append(mirror.trouble)
        if not wire.cut:
            wire.refusal = None
        wire.cut = False

    async with running(wire, pause=pause) as mirror:
        wire.cut, wire.refusal = True, refusal
        pool = await store.create(a_pool())
        await until(mirror, lambda: mirror.pools == {P: pool})
    assert seen == ["the wire is cut", refusal.message]


async def test_an_object_that_cannot_be_read_is_kept_apart_until_it_can_be_read_again(tmp_path, store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    path = tmp_path / "state.db"

    with capture_logs() as logs:
        async with running(store) as mirror:
            spoil(path, worker.key.name, lambda doc: doc["status"].update(phase="Hibernating"))
            await store.replace(scaled(pool, 3))  # wakes the watches
            other = await store.create(new_worker(Slot("default", "p", 1), pool, None, {}))
            await until(mirror, lambda: worker.key in mirror.unreadable_workers)
            assert dict(mirror.workers) in ({}, {other.key: other}), "nobody decides by what it was before"
            assert mirror.unreadable_slots(P) == {Slot("default", "p", 0)}
            [found] = mirror.unreadable_of(P)
            assert "status.phase: must be" in found.reason
            mirror.apply(worker)
            assert worker.key not in mirror.workers, "an older version of it is no news"

            for number in (4, 5):  # the same again, with other words beside it
                spoil(
                    path, worker.key.name, lambda doc, number=number: doc["metadata"]["labels"].update(n=str(number))
                )
                await store.create(new_worker(Slot("default", "p", number), pool, None, {}))
            await until(mirror, lambda: mirror.unreadable_of(P)[0].document["metadata"]["labels"].get("n") == "5")

            spoil(path, worker.key.name, lambda doc: doc["status"].update(phase="Idle"))
            await store.create(new_worker(Slot("default", "p", 6), pool, None, {}))
            await until(mirror, lambda: worker.key in mirror.workers)
            assert mirror.unreadable_slots(P) == frozenset()
            assert mirror.unreadable_of(P) == []

    told = [line["event"] for line in logs if line["event"].startswith("store.")]
    assert told == ["store.object_unreadable", "store.object_readable"]


async def test_an_object_that_a_list_cannot_read_is_not_served_as_it_was(tmp_path, store):
    pool = await store.create(a_pool())
    mirror = Mirror(store)
    mirror.apply(pool)
    spoil(tmp_path / "state.db", "p", lambda doc: doc["spec"]["scaling"].update(max="many"))

    mirror._pools.listed(await store.list(Pool))

    assert mirror.pools == {}
    assert mirror.unreadable_pools[P].message.startswith("BuildKitPool default/p cannot be read: spec.scaling.max")


async def test_an_unreadable_object_that_is_deleted_leaves_nothing(tmp_path, store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    spoil(tmp_path / "state.db", worker.key.name, lambda doc: doc["status"].update(phase="Hibernating"))
    async with running(store) as mirror:
        assert mirror.unreadable_slots(P) == {Slot("default", "p", 0)}
        await store.delete(type(worker), *worker.key)
        await until(mirror, lambda: not mirror.unreadable_workers)
        assert mirror.unreadable_slots(P) == frozenset()


async def test_issuers_are_followed_only_if_configured(store):
    notified = asyncio.Event()
    settings = OIDCConfigSpec(issuer="https://issuer.example.com", audience="a")
    async with running(store, configs=True) as mirror, running(store) as other:
        unsubscribe = mirror.on_config(notified.set)
        made = await store.create(OIDCConfig(metadata=Metadata(name="c"), spec=settings))
        async with asyncio.timeout(60):
            await notified.wait()
        assert dict(mirror.configs) == {made.key: made}
        unsubscribe()
        notified.clear()
        await store.delete(OIDCConfig, *made.key)
        await store.create(a_pool())
        await until(mirror, lambda: not mirror.configs)
        assert not notified.is_set()
        assert not other.configs


def a_claim(pool: Pool, number: int) -> Worker:
    made = lease(id=f"lease-{number}", expires_at=datetime.now(UTC) + timedelta(hours=1))
    return new_worker(Slot("default", "p", number), pool, made, {LABEL_REQUEST: "job"})


async def test_the_order_of_claims_is_that_of_the_changes_and_not_of_what_was_written_here(store):
    pool, job = await store.create(a_pool()), Request(P, "job")
    connection = Cut(store)
    async with running(connection) as mirror:
        order, news = mirror.claims_in("default"), asyncio.Event()
        mirror.on_claims(lambda request: news.set() if request == job else None)
        first, second = [await store.create(a_claim(pool, number)) for number in (1, 0)]
        mirror.apply(second)
        while not (order.knows(job, "lease-0") and order.knows(job, "lease-1")):
            news.clear()
            await news.wait()
        assert order.first(job, lambda _worker: True) == first

        connection.cut = True
        await store.replace(first.with_lease(None))
        mirror.apply(await store.get(Worker, *first.key))
        assert mirror.workers[first.key].lease is None
        assert order.knows(job, "lease-1"), "no change has said so"


async def test_a_list_shows_claims_too(store):
    pool = await store.create(a_pool())
    claim = await store.create(a_claim(pool, 0))
    async with running(store) as mirror:
        assert mirror.claims_in("default").first(Request(P, "job"), lambda _worker: True) == claim


async def test_all_workers_can_be_looked_through_again_and_again(store):
    pool = await store.create(a_pool())
    claim = await store.create(a_claim(pool, 0))
    async with running(store) as mirror:
        workers = mirror.all_workers()
        assert list(workers) == list(workers) == [claim]
