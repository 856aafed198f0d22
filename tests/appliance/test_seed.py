"""The objects of the user's files are written into a real store."""

from __future__ import annotations

import pytest

from bkpool.appliance.seed import seed_objects
from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import Documents, read_documents
from bkpool.core.pool import Pool
from bkpool.store.sqlite import SqliteStore

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
        await seed_objects(store, read(POOL, CONFIG % ("one", audience)), only_source=True)
        (config,) = (await store.list(OIDCConfig)).items
        assert (config.spec.audience, await names(store, Pool)) == (audience, ["ci"])


async def test_a_default_pool_is_created_if_there_is_none(store):
    await seed_objects(store, Documents(), only_source=False)
    assert await names(store, Pool) == ["default"]


async def test_an_issuer_that_was_removed_from_the_files_is_deleted(store):
    await seed_objects(store, read(CONFIG % ("one", "a"), CONFIG % ("two", "a")), only_source=True)
    await seed_objects(store, read(POOL), only_source=False)
    assert await names(store, OIDCConfig) == ["one", "two"]
    await seed_objects(store, read(CONFIG % ("two", "a")), only_source=True)
    assert await names(store, OIDCConfig) == ["two"]
    assert await names(store, Pool) == ["ci", "default"]
