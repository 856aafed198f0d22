"""Workers of a former CA: replaced when nobody has leased them, and reachable until then."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bkpool.core.errors import NotFound
from bkpool.core.names import ANNOTATION_AUTHORITY, Key
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.kube import Doc
from bkpool.pki.authority import Authority
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.pods import pod_spec
from bkpool.workers.pods.pod_spec import ROOTLESS_IMAGE, PodRequest
from bkpool.workers.pods.runtime import PodRuntime
from support.objects import slot

NOW = datetime.now(UTC)
MASTER, OLDER = Authority.create(NOW), Authority.create(NOW)
POOL = Pool(metadata=Metadata(name="p", uid="pool-uid", generation=1))
P = Key("default", "p")


class Cluster:
    """A KubeApi that has no policy, takes every change, and notes what is deleted."""

    def __init__(self) -> None:
        self.deleted: list[str] = []

    async def get(self, path: str) -> Doc:
        raise NotFound(path)

    async def patch(self, path: str, body: Doc) -> Doc:
        metadata = body["metadata"]
        labels = {name: value for name, value in metadata["labels"].items() if value is not None}
        return a_pod(path.rpartition("-")[2], held=bool(labels), mark="")

    async def delete(self, path: str, *, uid: str, grace: int | None = None) -> None:
        assert grace is None, "builds in it may end"
        self.deleted.append(path.rpartition("/")[2])


def a_pod(number: str | int, *, held: bool, mark: str) -> Doc:
    request = PodRequest(slot(int(number)), "uid", "anna" if held else None, POOL, ROOTLESS_IMAGE, authority=mark)
    doc = pod_spec.pod(request)
    if not mark:
        del doc["metadata"]["annotations"][ANNOTATION_AUTHORITY]
    doc["metadata"] |= {"uid": f"pod-{number}", "resourceVersion": "7"}
    return doc


@pytest.fixture
async def cluster():
    return Cluster()


@pytest.fixture
async def runtime(cluster):
    return PodRuntime(cluster, authorities=PoolAuthorities(MASTER, OLDER))


CURRENT = PoolAuthorities(MASTER).current(P).mark
ROTATED = PoolAuthorities(OLDER).current(P).mark


@pytest.mark.parametrize("mark", ["", ROTATED], ids=["before pools had one", "rotated"])
async def test_idle_workers_of_a_former_ca_are_replaced_and_leased_ones_stay(runtime, cluster, mark):
    for number, held, of in ((0, False, mark), (1, True, mark), (2, False, CURRENT)):
        runtime._slots.pods.apply(a_pod(number, held=held, mark=of))
    await runtime.daemons.follow(POOL)
    assert cluster.deleted == ["p-worker-0"]


async def test_a_leased_worker_of_a_former_ca_is_replaced_when_its_lease_has_ended(runtime, cluster):
    runtime._slots.pods.apply(a_pod(0, held=True, mark=""))
    await runtime.daemons.protect(slot(0), held=True)
    assert cluster.deleted == []
    await runtime.daemons.protect(slot(0), held=False)
    assert cluster.deleted == ["p-worker-0"]


async def test_a_pod_of_a_former_ca_is_seen_so_and_does_not_wait_for_the_end_of_its_protection(runtime):
    for number, mark in ((0, ROTATED), (1, CURRENT)):
        runtime._slots.pods.apply(a_pod(number, held=True, mark=mark))
    await runtime.daemons.follow(POOL)
    assert [runtime.daemons.seen(slot(number)).goes_unprotected for number in (0, 1)] == [True, False]


async def test_the_former_ca_is_known_as_long_as_it_has_a_worker(runtime):
    daemons, pods = runtime.daemons, runtime._slots.pods
    assert daemons.former_authority(P) is None
    pods.apply(a_pod(0, held=True, mark=CURRENT))
    assert daemons.former_authority(P) is None
    pods.apply(a_pod(1, held=True, mark=ROTATED))
    assert daemons.former_authority(P).mark == ROTATED
    pods.apply(a_pod(2, held=True, mark=""))
    assert daemons.former_authority(P).mark == MASTER.mark, "before each pool had a CA of its own"
    assert daemons.former_authority(Key("other", "p")) is None


async def test_a_pod_is_probed_with_the_ca_that_it_was_made_with(runtime, monkeypatch):
    used = []

    async def probe(_host, _port, context, _uid, _sessions):
        used.append(context)

    monkeypatch.setattr("bkpool.workers.pods.pod_probe.probe_tls", probe)
    for mark in (CURRENT, ROTATED, ""):
        doc = a_pod(0, held=False, mark=mark) | {"status": {"podIP": "192.0.2.7"}}
        await runtime._slots._probe.probe(doc)
    assert used == [context for mark in (CURRENT, ROTATED, "") for context in runtime.contexts.of_worker(P, mark)[:1]]
    assert len({*map(id, used)}) == 3
