"""The build history of pods: a volume of the whole pool brings none of it to the next caller.

The cluster is a dictionary here; e2e/test_tenants.py does the same with real pods.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from bkpool.buildkit.stubs import control_pb2 as pb
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.core.pool import Reuse
from bkpool.kube.reflector import KubeCollection, Reflector
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.config import GC_DEFAULTS
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.pod_daemons import PodDaemons
from bkpool.workers.pods.pod_probe import PodProbe
from bkpool.workers.pods.pod_spec import SELECTOR, PodRequest
from bkpool.workers.pods.pod_writes import CLAIMS, PODS, PodWrites
from bkpool.workers.pods.start_deadline import Deadlines
from support.memory_cluster import MemoryCluster
from support.objects import pool, slot
from support.stub_control import BACKEND, NOW, StubControl, serve, server_context, tls

POOL = pool(cache={"reuse": "pool", "backends": [{"type": "local"}]})
SHARED = cache_owner_digest(Reuse.POOL, "ann", POOL.uid, "")
KEPT = cache_owner_digest(Reuse.POOL, "ann", POOL.uid, "", keep_history=True)


@pytest.fixture
def writes():
    api = MemoryCluster()
    pods, claims = (Reflector(api, KubeCollection("v1", plural, SELECTOR)) for plural in (PODS, CLAIMS))
    return PodWrites(
        api,
        PoolAuthorities(BACKEND),
        pods=pods,
        claims=claims,
        now=lambda: NOW,
        deletion_timeout=1,
        gc_defaults=GC_DEFAULTS,
    )


@pytest.mark.parametrize(("owner", "old"), [(SHARED, True), (KEPT, False), ("a tenant", False)])
async def test_a_pod_on_a_volume_of_the_pool_is_marked_until_its_history_is_cleared(writes, owner, old):
    made = await writes.make(PodRequest(slot(0), "uid-1", owner, POOL, "an/image:1"))
    assert pod_view.has_old_history(made) is old
    await writes.note_history_cleared(made)
    assert not pod_view.has_old_history(writes._pods.get(slot(0).worker))
    assert pod_view.worker_uid(made) == "uid-1"


async def test_a_volume_that_nobody_has_used_has_no_history(writes):
    made = await writes.make(PodRequest(slot(0), "uid-1", None, POOL, "an/image:1"))
    assert not pod_view.has_old_history(made)


async def test_the_history_of_a_pod_is_cleared_over_mutual_tls(writes, tmp_path):
    made = await writes.make(PodRequest(slot(0), "uid-1", SHARED, POOL, "an/image:1", host_port=0))
    left = [pb.BuildHistoryEvent(type=pb.COMPLETE, record=pb.BuildHistoryRecord(Ref="a"))]

    class Control(StubControl):
        async def ListenBuildHistory(self, stream):  # noqa: N802 - BuildKit's name
            self.events = [left.pop()] if left else []
            await super().ListenBuildHistory(stream)

    control = Control()
    async with serve(control, host="127.0.0.1", port=0, ssl=server_context(tmp_path)) as server:
        port = server._server.sockets[0].getsockname()[1]
        made["spec"]["containers"][0]["ports"][0]["hostPort"] = port
        contexts = SimpleNamespace(of_worker=lambda _pool, _mark: [tls().context])
        await PodProbe(contexts, "127.0.0.1").clear_history(made)
        assert pb.UpdateBuildHistoryRequest(Ref="a", Delete=True) in control.requests
        made["metadata"]["annotations"] |= {name: "uid-2" for name, uid in _annotations(made) if uid == "uid-1"}
        with pytest.raises(WorkerFailed):
            await PodProbe(contexts, "127.0.0.1").clear_history(made)
    with pytest.raises(Unavailable, match="no address yet"):
        await PodProbe(contexts, None).clear_history(made)


def _annotations(doc):
    return list(doc["metadata"]["annotations"].items())


class Recorder:
    """Stands for the writes and the probe of `PodDaemons`; notes what was called."""

    def __init__(self, failure=None):
        self.calls, self.failure = [], failure

    def __getattr__(self, name):
        async def call(*_args):
            self.calls.append(name)
            if name == "clear_history" and self.failure is not None:
                raise self.failure

        return call


def daemons(pods, recorder):
    lock = SimpleNamespace(lock=asyncio.Lock())
    slots = SimpleNamespace(pods=SimpleNamespace(get=pods.get), get=lambda _slot: lock)
    return PodDaemons(
        slots,
        recorder,
        recorder,
        None,
        authorities=PoolAuthorities(BACKEND),
        host_ports=None,
        image=None,
        ignored_spec_fields=(),
        deadlines=Deadlines(),
    )


@pytest.mark.parametrize(
    ("failure", "calls"),
    [
        (None, ["clear_history"]),
        (Unavailable("gone"), ["clear_history", "end"]),
        (WorkerFailed("no"), ["clear_history", "end"]),
    ],
)
async def test_at_the_end_of_a_lease_a_pod_is_cleared_or_ended(writes, failure, calls):
    made = await writes.make(PodRequest(slot(0), "uid-1", SHARED, POOL, "an/image:1"))
    recorder = Recorder(failure)
    await daemons({slot(0).worker: made}, recorder).clear_history(slot(0))
    assert recorder.calls == calls
    recorder = Recorder()
    await daemons({}, recorder).clear_history(slot(0))
    assert recorder.calls == []


async def test_a_volume_whose_history_cannot_be_cleared_is_removed(writes):
    made = await writes.make(PodRequest(slot(0), "uid-1", SHARED, POOL, "an/image:1"))
    recorder = Recorder()
    await daemons({}, recorder)._begin_history(made)
    assert recorder.calls == ["clear_history", "note_history_cleared"]
    recorder = Recorder(WorkerFailed("no"))
    with pytest.raises(WorkerFailed, match="could not be cleared, so the cache was wiped"):
        await daemons({}, recorder)._begin_history(made)
    assert recorder.calls == ["clear_history", "end", "remove_claim"]
