"""The objects of the user's files in a real store; the watchdog's life."""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack

import pytest

from bkpool.appliance.parts import apply, watched
from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import Documents, read_documents
from bkpool.core.pool import Pool
from bkpool.store.sqlite import SqliteStore
from bkpool.telemetry.registry import new_registry

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


async def test_what_the_files_say_is_made_so_and_again(store):
    for audience in ("a", "b"):
        await apply(store, read(POOL, CONFIG % ("one", audience)), only_source=True)
        (config,) = (await store.list(OIDCConfig)).items
        assert (config.spec.audience, await names(store, Pool)) == (audience, ["ci"])


async def test_without_any_pool_there_is_one(store):
    await apply(store, Documents(), only_source=False)
    assert await names(store, Pool) == ["default"]


async def test_an_issuer_that_the_files_no_longer_have_is_believed_no_more(store):
    await apply(store, read(CONFIG % ("one", "a"), CONFIG % ("two", "a")), only_source=True)
    await apply(store, read(POOL), only_source=False)
    assert await names(store, OIDCConfig) == ["one", "two"]
    await apply(store, read(CONFIG % ("two", "a")), only_source=True)
    assert await names(store, OIDCConfig) == ["two"]
    assert await names(store, Pool) == ["ci", "default"]


async def test_the_loop_is_watched_until_the_stack_is_left():
    def threads():
        return {thread.name for thread in threading.enumerate()}

    async with AsyncExitStack() as stack:
        watched(stack, new_registry())
        assert "watchdog" in threads()
    assert "watchdog" not in threads()
