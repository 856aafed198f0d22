"""What every Store must do. The tests use only the protocol, so that they can run against every implementation."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import Conflict, Gone, InvalidInput, NotFound
from bkpool.core.names import LABEL_POOL, Key, Slot
from bkpool.core.pool import Pool, PoolSpec, PoolStatus, Scaling
from bkpool.core.resource import Metadata, OwnerReference
from bkpool.core.worker import Lease, Phase, Worker, new_worker
from bkpool.store import Store


def a_pool(name: str = "p", namespace: str = "default", **metadata) -> Pool:
    return Pool(metadata=Metadata(name=name, namespace=namespace, **metadata))


def with_metadata(obj, **changes):
    return obj.but(metadata=obj.metadata.but(**changes))


def scaled(pool: Pool, maximum: int) -> Pool:
    return pool.but(spec=pool.spec.but(scaling=Scaling(max=maximum)))


def a_lease(lease_id: str) -> Lease:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    return Lease(
        id=lease_id,
        token_sha256="0" * 64,
        requested_by="admin",
        owner="o",
        allocated_at=at,
        expires_at=at + timedelta(hours=1),
        not_after=at + timedelta(hours=24),
    )


def version(obj) -> int:
    return int(obj.metadata.resource_version)


async def seen(store: Store, kind, since: str, until) -> list:
    """The events after `since`, up to and including the first for which `until` is true."""
    events = []
    async with asyncio.timeout(60), aclosing(store.watch(kind, since)) as watch:
        async for event in watch:
            events.append(event)
            if until(event):
                return events
    raise AssertionError("a watch has no end")


# --- create, get, list ----------------------------------------------------------------------------------------------


async def test_a_created_object_gets_uid_generation_version_and_creation_time(store):
    made = await store.create(a_pool(labels={"team": "a"}, annotations={"n": "1"}))

    assert made.uid
    assert made.metadata.generation == 1
    assert version(made) > 0
    assert abs(datetime.now(UTC) - made.metadata.creation_timestamp) < timedelta(minutes=1)
    assert made.metadata.deletion_timestamp is None
    assert await store.get(Pool, "default", "p") == made


async def test_create_keeps_spec_and_status_as_given(store):
    given = a_pool().but(spec=PoolSpec(scaling=Scaling(min=1, max=3)), status=PoolStatus(phase="Ready", idle=2))

    made = await store.create(given)

    assert (made.spec, made.status) == (given.spec, given.status)


async def test_create_ignores_fields_that_only_the_store_sets(store):
    foreign = a_pool(uid="mine", resource_version="77777", generation=9, deletion_timestamp=datetime.now(UTC))

    made = await store.create(foreign)

    assert made.uid != "mine"
    assert version(made) != 77777
    assert made.metadata.generation == 1
    assert made.metadata.deletion_timestamp is None


async def test_a_taken_name_is_a_conflict_that_names_it_and_changes_nothing(store):
    made = await store.create(a_pool())

    with pytest.raises(Conflict, match="BuildKitPool default/p"):
        await store.create(a_pool(labels={"other": "one"}))

    assert await store.get(Pool, "default", "p") == made


async def test_names_are_per_namespace_and_kind(store):
    pool = await store.create(a_pool("p-worker-0"))
    await store.create(a_pool("p-worker-0", "other"))
    await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))


async def test_a_missing_object_raises_not_found_with_its_name(store):
    for ask in (
        store.get(Pool, "default", "none"),
        store.replace(a_pool("none", resource_version="1")),
        store.replace_status(a_pool("none", resource_version="1")),
        store.delete(Pool, "default", "none"),
    ):
        with pytest.raises(NotFound, match="BuildKitPool default/none"):
            await ask


async def test_unknown_fields_are_kept(store):
    data = a_pool().to_json()
    data["spec"]["gateway"]["gatewayAPI"] = {"deep": [1, 2]}  # in the contract, and so in a cluster's schema
    made = await store.create(Pool.model_validate(data))

    await store.replace(scaled(made, 7))

    assert (await store.get(Pool, "default", "p")).spec.gateway.model_extra == {"gatewayAPI": {"deep": [1, 2]}}


async def test_a_list_is_of_one_kind_and_can_be_narrowed_to_a_namespace(store):
    pool = await store.create(a_pool("a"))
    await store.create(a_pool("b"))
    await store.create(a_pool("a", "other"))
    await store.create(new_worker(Slot("default", "a", 0), pool, None, {}))

    assert {p.key for p in (await store.list(Pool)).items} == {
        Key("default", "a"),
        Key("default", "b"),
        Key("other", "a"),
    }
    assert {p.key for p in (await store.list(Pool, namespace="other")).items} == {Key("other", "a")}
    assert (await store.list(Pool, namespace="empty")).items == ()


async def test_a_list_by_labels_requires_all_of_them_and_sees_changed_labels(store):
    one = await store.create(a_pool("one", labels={"team": "a", "tier": "x"}))
    await store.create(a_pool("two", labels={"team": "a"}))
    await store.create(a_pool("three", labels={"team": "ab"}))

    async def names(**labels):
        return {p.metadata.name for p in (await store.list(Pool, labels=labels)).items}

    assert await names(team="a") == {"one", "two"}
    assert await names(team="a", tier="x") == {"one"}
    assert await names(team="a", tier="y") == set()

    await store.replace(with_metadata(one, labels={"team": "b"}))
    assert await names(team="a") == {"two"}
    assert await names(team="b") == {"one"}
    await store.delete(Pool, "default", "one")
    assert await names(team="b") == set()


# --- replace and replace_status -------------------------------------------------------------------------------------


async def test_replace_changes_spec_and_metadata_and_leaves_the_status(store):
    made = await store.create(a_pool().but(status=PoolStatus(phase="Ready")))

    changed = with_metadata(scaled(made, 3), labels={"l": "1"}).but(status=PoolStatus(phase="Broken"))
    replaced = await store.replace(changed)

    assert replaced.spec.scaling.max == 3
    assert replaced.metadata.labels == {"l": "1"}
    assert replaced.status.phase == "Ready"
    assert await store.get(Pool, "default", "p") == replaced


async def test_replace_status_changes_the_status_and_nothing_else(store):
    made = await store.create(a_pool())

    changed = with_metadata(scaled(made, 3), labels={"l": "1"}).but(status=PoolStatus(phase="Broken"))
    replaced = await store.replace_status(changed)

    assert replaced.status.phase == "Broken"
    assert replaced.spec == made.spec
    assert replaced.metadata.labels == {}
    assert replaced.metadata.generation == 1
    assert version(replaced) > version(made)


async def test_both_raise_the_version_and_only_a_changed_spec_raises_the_generation(store):
    made = await store.create(a_pool())
    labelled = await store.replace(with_metadata(made, labels={"l": "1"}))
    respecified = await store.replace(scaled(labelled, 3))
    observed = await store.replace_status(respecified.but(status=PoolStatus(phase="Ready")))

    versions = [version(obj) for obj in (made, labelled, respecified, observed)]
    assert versions == sorted(set(versions))
    assert [obj.metadata.generation for obj in (made, labelled, respecified, observed)] == [1, 1, 2, 2]


async def test_a_replace_without_changes_keeps_the_version(store):
    made = await store.create(a_pool(labels={"l": "1"}).but(status=PoolStatus(phase="Ready")))
    since = (await store.list(Pool)).resource_version

    assert await store.replace(made.but(status=PoolStatus(phase="ignored here"))) == made
    assert await store.replace_status(scaled(made, 9)) == made

    last = await store.replace(scaled(made, 3))
    assert [e.object for e in await seen(store, Pool, since, lambda e: True)] == [last]


async def test_a_write_to_an_object_that_has_changed_is_a_conflict(store):
    made = await store.create(a_pool())
    newer = await store.replace_status(made.but(status=PoolStatus(phase="Ready")))

    for write in (store.replace, store.replace_status):
        with pytest.raises(Conflict, match="default/p"):
            await write(scaled(made, 3).but(status=PoolStatus(phase="Old")))
    assert await store.get(Pool, "default", "p") == newer


async def test_a_write_to_an_object_that_was_created_again_is_a_conflict(store):
    made = await store.create(a_pool())
    await store.delete(Pool, "default", "p")
    again = await store.create(a_pool())

    with pytest.raises(Conflict):
        await store.replace(scaled(made, 3))
    assert again.uid != made.uid


async def test_only_the_store_sets_uid_and_creation_time(store):
    made = await store.create(a_pool())

    replaced = await store.replace(
        with_metadata(
            scaled(made, 3), uid="x", creation_timestamp=None, deletion_timestamp=datetime.now(UTC), generation=77
        )
    )

    assert replaced.uid == made.uid
    assert replaced.metadata.creation_timestamp == made.metadata.creation_timestamp
    assert replaced.metadata.deletion_timestamp is None
    assert replaced.metadata.generation == 2


async def test_a_claim_takes_and_a_release_clears_the_allocation(store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, a_lease("first"), {}))

    freed = await store.replace(worker.with_lease(None))
    assert freed.lease is None
    assert (await store.replace(freed.with_lease(a_lease("second")))).lease == a_lease("second")


@pytest.mark.slow
@pytest.mark.any_python
async def test_of_two_hundred_writers_at_once_exactly_one_wins_each_version(store):
    obj = await store.create(a_pool())
    for round_ in range(2, 5):

        async def attempt(number: int, obj: Pool = obj) -> Pool | None:
            try:
                return await store.replace(scaled(obj, number))
            except Conflict:
                return None

        won = [w for w in await asyncio.gather(*(attempt(n) for n in range(1000 * round_, 1000 * round_ + 200))) if w]
        assert len(won) == 1
        assert won[0].metadata.generation == round_
        obj = await store.get(Pool, "default", "p")
        assert obj == won[0]


@pytest.mark.slow
@pytest.mark.any_python
async def test_of_two_hundred_creators_at_once_exactly_one_wins(store):
    outcomes = await asyncio.gather(*(store.create(a_pool()) for _ in range(200)), return_exceptions=True)

    assert sum(isinstance(o, Pool) for o in outcomes) == 1
    assert sum(isinstance(o, Conflict) for o in outcomes) == 199


# --- delete, finalizers, owners -------------------------------------------------------------------------------------


async def test_a_deleted_object_does_not_exist_and_its_name_is_free(store):
    await store.create(a_pool())
    await store.delete(Pool, "default", "p")

    with pytest.raises(NotFound):
        await store.get(Pool, "default", "p")
    await store.create(a_pool())


async def test_a_delete_can_be_bound_to_the_uid_and_the_version(store):
    made = await store.create(a_pool())

    for condition in ({"uid": "another"}, {"resource_version": str(version(made) + 1)}):
        with pytest.raises(Conflict, match="default/p"):
            await store.delete(Pool, "default", "p", **condition)
    await store.delete(Pool, "default", "p", uid=made.uid, resource_version=made.metadata.resource_version)


async def test_with_finalizers_a_delete_only_marks_and_removing_the_last_one_deletes(store):
    made = await store.create(a_pool(finalizers=("x/one", "x/two")))

    await store.delete(Pool, "default", "p")
    marked = await store.get(Pool, "default", "p")
    assert marked.metadata.deletion_timestamp is not None
    assert version(marked) > version(made)
    assert marked.metadata.generation == 2, "as in Kubernetes, where the mark is a change of what is wanted"

    await store.delete(Pool, "default", "p")
    assert await store.get(Pool, "default", "p") == marked, "a second delete changes nothing"

    one_left = await store.replace(with_metadata(marked, finalizers=("x/two",)))
    observed = await store.replace_status(one_left.but(status=PoolStatus(phase="Terminating")))
    assert observed.metadata.deletion_timestamp == marked.metadata.deletion_timestamp
    await store.replace(with_metadata(observed, finalizers=()))
    with pytest.raises(NotFound):
        await store.get(Pool, "default", "p")


async def test_an_object_that_is_being_deleted_cannot_get_a_new_finalizer(store):
    await store.create(a_pool(finalizers=("x/one",)))
    await store.delete(Pool, "default", "p")
    marked = await store.get(Pool, "default", "p")

    with pytest.raises(InvalidInput) as refused:
        await store.replace(with_metadata(marked, finalizers=("x/one", "x/two")))
    assert refused.value.field == "metadata.finalizers"


async def test_removing_finalizers_alone_deletes_nothing(store):
    made = await store.create(a_pool(finalizers=("x/one",)))
    await store.replace(with_metadata(made, finalizers=()))
    await store.get(Pool, "default", "p")


async def test_with_an_object_only_its_owned_objects_are_deleted(store):
    pool, other = await store.create(a_pool()), await store.create(a_pool("q"))
    since = (await store.list(Worker)).resource_version
    for slot in (Slot("default", "p", 0), Slot("default", "p", 1)):
        await store.create(new_worker(slot, pool, None, {}))
    kept = await store.create(new_worker(Slot("default", "q", 0), other, None, {}))

    await store.delete(Pool, "default", "p")

    gone: set[str] = set()
    await seen(
        store, Worker, since, lambda e: e.type == "DELETED" and (gone.add(e.object.key.name) or len(gone) == 2)
    )
    assert gone == {"p-worker-0", "p-worker-1"}
    assert (await store.list(Worker)).items == (kept,)
    assert (await store.list(Worker, labels={LABEL_POOL: "p"})).items == ()


async def test_an_owned_object_with_finalizers_is_marked_and_stays_until_they_are_removed(store):
    pool = await store.create(a_pool())
    made = await store.create(
        with_metadata(new_worker(Slot("default", "p", 0), pool, None, {}), finalizers=("x/clean",))
    )

    await store.delete(Pool, "default", "p")

    (event,) = await seen(store, Worker, made.metadata.resource_version, lambda e: True)
    assert event.type == "MODIFIED"
    assert event.object.metadata.deletion_timestamp is not None
    await store.replace(with_metadata(event.object, finalizers=()))
    assert (await store.list(Worker)).items == ()


async def test_owned_objects_wait_while_finalizers_hold_their_owner(store):
    pool = await store.create(a_pool(finalizers=("x/hold",)))
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))

    await store.delete(Pool, "default", "p")
    assert (await store.list(Worker)).items == (worker,)

    await store.replace(with_metadata(await store.get(Pool, "default", "p"), finalizers=()))
    await seen(store, Worker, worker.metadata.resource_version, lambda e: e.type == "DELETED")


async def test_an_object_with_another_existing_owner_stays(store):
    first, second = await store.create(a_pool()), await store.create(a_pool("q"))
    owners = tuple(OwnerReference(kind=Pool.KIND, name=p.key.name, uid=p.uid) for p in (first, second))
    shared = await store.create(
        with_metadata(new_worker(Slot("default", "p", 0), first, None, {}), owner_references=owners)
    )

    await store.delete(Pool, "default", "p")
    (stayed,) = (await store.list(Worker)).items
    assert stayed.uid == shared.uid, "it may have lost the reference to the deleted owner"
    await store.delete(Pool, "default", "q")
    await seen(store, Worker, shared.metadata.resource_version, lambda e: e.type == "DELETED")


async def test_an_object_whose_owner_was_deleted_before_it_was_created_is_deleted(store):
    pool = await store.create(a_pool())
    since = (await store.list(Worker)).resource_version
    await store.delete(Pool, "default", "p")

    await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))

    events = await seen(store, Worker, since, lambda e: e.type == "DELETED")
    assert [e.type for e in events] == ["ADDED", "DELETED"]


# --- watch ----------------------------------------------------------------------------------------------------------


async def test_a_watch_replays_in_order_what_happened_after_the_list(store):
    before = await store.create(a_pool("before"))
    since = (await store.list(Pool)).resource_version
    made = await store.create(a_pool())
    ready = await store.replace_status(made.but(status=PoolStatus(phase="Ready")))
    await store.delete(Pool, "default", "p")

    events = await seen(store, Pool, since, lambda e: e.type == "DELETED")

    assert [(e.type, e.object.status) for e in events] == [
        ("ADDED", made.status),
        ("MODIFIED", ready.status),
        ("DELETED", ready.status),
    ]
    assert [e.object for e in events[:2]] == [made, ready]
    versions = [version(before), *(version(e.object) for e in events)]
    assert versions == sorted(set(versions)), "a watch can continue from any event"


async def test_a_watch_continues_from_old_to_new_changes_without_a_gap(store):
    since = (await store.list(Pool)).resource_version
    obj = await store.create(a_pool())

    async def write() -> None:
        current = obj
        for number in range(100, 200):
            current = await store.replace(scaled(current, number))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        watching = [tasks.create_task(seen(store, Pool, since, lambda e: e.object.spec.scaling.max == 199))]
        watching.append(
            tasks.create_task(
                seen(store, Pool, obj.metadata.resource_version, lambda e: e.object.spec.scaling.max == 199)
            )
        )

    first, second = (task.result() for task in watching)
    assert [e.object.spec.scaling.max for e in first] == [10, *range(100, 200)]
    assert [e.object.spec.scaling.max for e in second] == list(range(100, 200))


async def test_a_watch_is_of_one_kind(store):
    since = (await store.list(Worker)).resource_version
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))

    assert [e.object for e in await seen(store, Worker, since, lambda e: True)] == [worker]


async def test_a_change_wakes_a_waiting_watch(store):
    since = (await store.list(Pool)).resource_version
    async with aclosing(store.watch(Pool, since)) as watch:
        waiting = asyncio.ensure_future(anext(watch))
        await store.list(Pool)  # the watch has read the log and found nothing
        assert not waiting.done()
        made = await store.create(a_pool())
        async with asyncio.timeout(60):
            assert (await waiting).object == made


async def test_a_list_and_the_events_after_it_give_the_current_list(store):
    await store.create(a_pool("old"))
    listing = await store.list(Pool)
    held = {p.key: p for p in listing.items}
    doomed = await store.create(a_pool("doomed"))
    await store.replace(scaled(doomed, 4))
    await store.delete(Pool, "default", "doomed")
    await store.delete(Pool, "default", "old")
    await store.create(a_pool("old", labels={"second": "life"}))
    await store.create(a_pool("last"))

    for event in await seen(store, Pool, listing.resource_version, lambda e: e.object.key.name == "last"):
        if event.type == "DELETED":
            del held[event.object.key]
        else:
            held[event.object.key] = event.object

    assert sorted(held.values(), key=lambda p: p.key) == sorted((await store.list(Pool)).items, key=lambda p: p.key)


async def test_a_watch_from_an_invalid_version_raises_gone(store):
    for nonsense in ("banana", "-1", ""):
        with pytest.raises(Gone):
            await anext(store.watch(Pool, nonsense))


async def test_a_phase_and_its_times_are_stored_and_read_unchanged(store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, a_lease("x"), {"l": "1"}))
    at = datetime(2031, 2, 3, 4, 5, 6, 789000, tzinfo=UTC)

    written = await store.replace_status(worker.with_status(phase=Phase.IDLE, ready_at=at, failures=2))

    assert written == await store.get(Worker, *worker.key)
    assert written.status.ready_at == at
