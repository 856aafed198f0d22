import pytest

from bkpool.core.names import Key
from bkpool.store.sqlite import SqliteStore
from support.job_race import JobRace
from support.world import running_world


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path) as world:
        yield world


@pytest.fixture
async def two_replicas(tmp_path):
    async with running_world(tmp_path, replicas=2) as world:
        yield world


@pytest.fixture
async def race(tmp_path):
    """Two replicas with idle workers and no controller: nothing changes but by them."""
    store = await SqliteStore.open(tmp_path / "state.db")
    race = JobRace(store, 0, Key("default", "p"))
    async with race.running():
        yield race
    await store.close()
