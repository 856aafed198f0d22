"""A worker that loses the label by which its gateway follows it keeps its builds. All but buildkitd is real."""

from __future__ import annotations

import asyncio
import itertools
from datetime import timedelta

from bkpool.core import tokens
from bkpool.core.names import LABEL_POOL, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker, new_worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.control.table_feeder import TableFeeder
from bkpool.kube import KubeApi
from bkpool.kube.access import ClusterAccess
from bkpool.store.bounds import StoreBounds
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror
from support.fake_api_server import fake_api_server


async def changed_until(mirror, condition):
    changed = asyncio.Event()
    unsubscribe = mirror.subscribe(lambda _change: changed.set())
    async with asyncio.timeout(60):
        while not condition():
            changed.clear()
            await changed.wait()
    unsubscribe()


async def test_a_build_goes_on_when_its_worker_loses_its_label_and_ends_when_the_lease_has_left_it(
    new_world, worker_lease, now, tmp_path
):
    async with fake_api_server() as server:
        api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "cluster")))
        everything = KubernetesStore(api)
        pool = await everything.create(Pool(metadata=Metadata(name="p")))
        store = KubernetesStore(api, StoreBounds.of_pool(pool.key))
        mirror = Mirror(store)
        following = asyncio.create_task(mirror.run())
        await mirror.ready.wait()
        feeder, ticks = TableFeeder(mirror), itertools.count()
        registry = StoreLeaseRegistry(
            store,
            "gateway",
            lambda: now + timedelta(seconds=next(ticks)),
            mirror.apply,
            known=mirror.workers.get,
            hand_on=feeder.hand_on,
        )
        world = await new_world(registry=registry)
        unfeed = feeder.start(world.gateway.update)
        token = world.token("a")
        lease = worker_lease.but(token_sha256=tokens.digest(token))
        worker = await everything.create(new_worker(Slot("default", "p", 0), pool, lease, {}))
        ready = {"phase": Phase.ALLOCATED, "endpoint": world.endpoint, "cache_owner": lease.owner}
        await everything.replace_status(worker.with_status(**ready))
        streams = await world.connect(token)
        await streams.echo(b"building")

        held = await everything.get(Worker, *worker.key)
        unlabelled = {name: value for name, value in held.metadata.labels.items() if name != LABEL_POOL}
        vanished = asyncio.create_task(changed_until(mirror, lambda: worker.key not in mirror.workers))
        await everything.replace(held.but(metadata=held.metadata.but(labels=unlabelled)))
        await vanished
        await changed_until(mirror, lambda: worker.key in mirror.workers)  # by the renewal's answer
        await world.settle()
        await streams.echo(b"still building")
        await (await world.connect(token)).echo(b"also a new connection")

        held = await everything.get(Worker, *worker.key)
        await everything.replace(held.with_lease(None))
        server.expire_watches()  # the list has only workers with the label
        assert await streams.read_to_end() == b""

        unfeed()
        await world.gateway.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await api.close()
