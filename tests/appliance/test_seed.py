"""The objects of the user's files are written into a real store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from bkpool.appliance.seed import seed_objects
from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import Documents, read_documents
from bkpool.core.names import ANNOTATION_REMOVING, ANNOTATION_SOURCE, Key
from bkpool.core.pool import Pool
from bkpool.core.removal import being_removed, removal_of
from bkpool.core.resource import Metadata
from bkpool.store.sqlite import SqliteStore
from support.unreadable import spoil

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
HEAD = "apiVersion: buildkit.smrt-devops.net/v1alpha1\n"
POOL = HEAD + "kind: BuildKitPool\nmetadata: {name: ci}\nspec: {scaling: {max: 3}}\n"
CONFIG = HEAD + "kind: BuildKitOIDCConfig\nmetadata: {name: %s}\nspec: {issuer: 'https://i.example', audience: %s}\n"


@pytest.fixture
async def store(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    yield store
    await store.close()


def read(*texts: str) -> Documents:
    return read_documents("---\n".join(texts), source="f")


async def names(store, kind) -> list[str]:
    return sorted(obj.key.name for obj in (await store.list(kind)).items)


async def test_objects_of_the_files_are_created_and_later_updated(store):
    for audience in ("a", "b"):
        await seed_objects(store, read(POOL, CONFIG % ("one", audience)), only_source=True, now=NOW)
        (config,) = (await store.list(OIDCConfig)).items
        assert (config.spec.audience, await names(store, Pool)) == (audience, ["ci"])


@pytest.mark.parametrize(
    "change",
    [lambda doc: doc["spec"]["scaling"].update(max="many"), lambda doc: doc.update(status={"workers": "all"})],
    ids=["spec", "status"],
)
async def test_an_object_that_cannot_be_read_is_corrected_by_the_file(store, tmp_path, change):
    await seed_objects(store, read(POOL), only_source=False, now=NOW)
    (before,) = (await store.list(Pool)).items
    spoil(tmp_path / "state.db", "ci", change)
    await seed_objects(store, read(POOL), only_source=False, now=NOW)
    (pool,) = (await store.list(Pool)).items
    assert (pool.uid, pool.spec) == (before.uid, before.spec), "the same pool, with its workers and caches"


async def test_a_default_pool_is_not_created_beside_one_that_cannot_be_read(store, tmp_path):
    await seed_objects(store, read(POOL), only_source=False, now=NOW)
    spoil(tmp_path / "state.db", "ci", lambda doc: doc["spec"]["scaling"].update(max="many"))
    await seed_objects(store, Documents(), only_source=False, now=NOW)
    assert [key.name for key in (await store.list(Pool)).keys] == ["ci"]


async def test_an_issuer_that_cannot_be_read_and_is_in_no_file_is_deleted(store, tmp_path):
    await seed_objects(store, read(CONFIG % ("one", "a"), CONFIG % ("two", "a")), only_source=True, now=NOW)
    spoil(tmp_path / "state.db", "one", lambda doc: doc["spec"].update(enabled="perhaps"))
    await seed_objects(store, read(CONFIG % ("two", "a")), only_source=True, now=NOW)
    assert [key.name for key in (await store.list(OIDCConfig)).keys] == ["two"]


async def test_a_default_pool_is_created_if_there_is_none(store):
    await seed_objects(store, Documents(), only_source=False, now=NOW)
    assert await names(store, Pool) == ["default"]


async def test_an_issuer_that_was_removed_from_the_files_is_deleted(store):
    await seed_objects(store, read(CONFIG % ("one", "a"), CONFIG % ("two", "a")), only_source=True, now=NOW)
    await seed_objects(store, read(POOL), only_source=False, now=NOW)
    assert await names(store, OIDCConfig) == ["one", "two"]
    await seed_objects(store, read(CONFIG % ("two", "a")), only_source=True, now=NOW)
    assert await names(store, OIDCConfig) == ["two"]
    assert await names(store, Pool) == ["ci", "default"]


def pool(name: str, **annotations: str) -> str:
    given = "".join(f"'{key}': '{value}', " for key, value in annotations.items())
    return HEAD + f"kind: BuildKitPool\nmetadata: {{name: {name}, annotations: {{{given}}}}}\nspec: {{}}\n"


async def removed(store) -> dict[str, bool]:
    return {found.key.name: removal_of(found) is not None for found in (await store.list(Pool)).items}


async def test_a_pool_that_no_file_names_any_more_is_removed_until_one_names_it_again(store):
    await seed_objects(store, read(pool("one"), pool("two", mine="x")), only_source=True, now=NOW)
    assert await seed_objects(store, read(pool("one")), only_source=True, now=NOW) == (Key("default", "two"),)
    assert await removed(store) == {"one": False, "two": True}
    later = NOW + timedelta(hours=1)
    assert await seed_objects(store, read(pool("one")), only_source=True, now=later) == ()
    two = await store.get(Pool, "default", "two")
    assert removal_of(two).since == NOW, "a second up does not begin again"
    await seed_objects(store, read(pool("two", mine="y")), only_source=True, now=later)
    assert await removed(store) == {"one": True, "two": False}
    assert (await store.get(Pool, "default", "two")).metadata.annotations == {"mine": "y", ANNOTATION_SOURCE: "file"}


@pytest.mark.parametrize(
    ("files", "only_source"),
    [
        ([], False),  # a bare up
        ([CONFIG % ("one", "a")], True),  # issuers only
        ([pool("one")], False),  # a cluster, where others make pools, too
    ],
)
async def test_only_files_with_a_pool_remove_others(store, files, only_source):
    await seed_objects(store, read(pool("one"), pool("two")), only_source=True, now=NOW)
    await seed_objects(store, read(*files) if files else Documents(), only_source=only_source, now=NOW)
    assert await removed(store) == {"one": False, "two": False}


async def test_a_pool_that_came_from_no_file_or_from_an_earlier_version_stays(store):
    await seed_objects(store, Documents(), only_source=False, now=NOW)  # the pool `default`
    await store.create(Pool(metadata=Metadata(name="before")))
    await seed_objects(store, read(pool("one")), only_source=True, now=NOW)
    assert await removed(store) == {"before": False, "default": False, "one": False}
    await seed_objects(store, read(pool("one"), pool("before")), only_source=True, now=NOW)
    await seed_objects(store, read(pool("one")), only_source=True, now=NOW)
    assert await removed(store) == {"before": True, "default": False, "one": False}, "it was named in between"


async def test_a_file_cannot_set_what_only_bkpool_sets(store):
    text = pool("one", **{ANNOTATION_REMOVING: NOW.isoformat(), ANNOTATION_SOURCE: "elsewhere"})
    await seed_objects(store, read(text), only_source=True, now=NOW)
    one = await store.get(Pool, "default", "one")
    assert one.metadata.annotations == {ANNOTATION_SOURCE: "file"}


async def test_a_pool_that_the_admin_deleted_comes_back_with_a_file_that_names_it(store):
    await seed_objects(store, read(pool("one")), only_source=True, now=NOW)
    one = await store.get(Pool, "default", "one")
    await store.replace(being_removed(one, NOW, caches_at_once=True))
    await seed_objects(store, Documents(), only_source=False, now=NOW)
    assert await removed(store) == {"one": True}, "a bare up does not bring it back"
    await seed_objects(store, read(pool("one")), only_source=True, now=NOW)
    assert await removed(store) == {"one": False}
