"""Two replicas ask for the same job a thousand times, with late watches, lost histories and kills in between."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from bkpool.core.names import Key
from bkpool.kube import ClusterAccess, KubeApi
from bkpool.store import Store
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.sqlite import SqliteStore
from support.fake_api_server import fake_api_server
from support.job_race import JobRace

ROUNDS = 1000
pytestmark = pytest.mark.only("process", "it starts no worker")


@pytest.fixture(params=["a file", "an API server"])
async def store(request, tmp_path):
    """The store of a machine, and that of a cluster with a fake API server."""
    async with AsyncExitStack() as stack:
        opened: Store
        if request.param == "a file":
            file = await SqliteStore.open(tmp_path / "state.db")
            stack.push_async_callback(file.close)
            opened = file
        else:
            server = await stack.enter_async_context(fake_api_server())
            api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig")))
            stack.push_async_callback(api.close)
            opened = KubernetesStore(api)
        yield opened


async def test_never_two_leases_of_a_job_and_each_round_ends_with_one(store):
    race = JobRace(store, 16, Key("default", "p"))
    await race.run(ROUNDS)
    assert race.kills > ROUNDS / 10
    assert race.joined > ROUNDS
