from __future__ import annotations

import asyncio

from bkpool.appliance.former_life import forget_unseen_endpoints
from bkpool.core.worker import Phase
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.objects import lease, seen, slot, worker


async def test_only_endpoints_of_daemons_that_were_found_are_believed(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    mirror = Mirror(store)
    following = asyncio.create_task(mirror.run())
    await mirror.ready.wait()
    stored = {
        0: worker(0),
        1: worker(1),
        2: worker(2, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a"),
        3: worker(3, phase=Phase.FAILED, message="killed"),
    }
    for number, one in stored.items():
        made = await store.create(one.but(metadata=one.metadata.but(resource_version="", uid="")))
        stored[number] = await store.replace_status(made.but(status=one.status))
        mirror.apply(stored[number])
    found = seen(0)
    observed = {slot(0): type(found)(stored[0].uid, found.state, found.endpoint, None)}
    observed[slot(1)] = type(found)("uid of an earlier worker", found.state, found.endpoint, None)
    await forget_unseen_endpoints(store, mirror, observed)
    now = {number: await store.get(type(one), *one.key) for number, one in stored.items()}
    assert now[0] == stored[0], "it answers"
    assert (now[1].status.endpoint, now[1].status.phase) == (None, Phase.PENDING)
    assert (now[2].status.endpoint, now[2].status.phase) == (None, Phase.PROVISIONING)
    assert now[2].lease == stored[2].lease, "the lease goes on"
    assert now[2].routable_endpoint is None
    assert now[3] == stored[3]
    assert mirror.workers[now[1].key] == now[1]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await store.close()
