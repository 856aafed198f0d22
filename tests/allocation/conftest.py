import pytest

from support.world import running_world


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path) as world:
        yield world


@pytest.fixture
async def two_replicas(tmp_path):
    async with running_world(tmp_path, replicas=2) as world:
        yield world
