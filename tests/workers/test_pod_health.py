"""Pods that hang: the port accepts, TLS is up, and no call is answered.

The cluster is a dictionary; the server speaks real TLS and HTTP/2.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from bkpool.core.observation import DaemonState
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.config import GC_DEFAULTS
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.pod_daemons import PodDaemons
from bkpool.workers.pods.pod_probe import PodProbe
from bkpool.workers.pods.pod_slots import PodSlots
from bkpool.workers.pods.pod_spec import PodRequest
from bkpool.workers.pods.pod_writes import PodWrites
from bkpool.workers.pods.start_deadline import Deadlines
from support.memory_cluster import MemoryCluster
from support.objects import pool, slot
from support.stub_control import BACKEND, NOW, StubControl, serve, server_context, tls

POOL = pool()


class HangingControl(StubControl):
    """Answers nothing while `hangs` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.answers.set()

    async def ListWorkers(self, stream):  # noqa: N802 - BuildKit's name
        await self.answers.wait()
        await super().ListWorkers(stream)


def replica(api):
    """What one control replica knows of the cluster."""
    contexts = SimpleNamespace(of_worker=lambda _pool, _mark: [tls().context])
    probe = PodProbe(contexts, "127.0.0.1")
    slots = PodSlots(api, probe, None, None)
    writes = PodWrites(
        api,
        PoolAuthorities(BACKEND),
        pods=slots.pods,
        claims=slots.claims,
        now=lambda: NOW,
        deletion_timeout=1,
        gc_defaults=GC_DEFAULTS,
    )
    daemons = PodDaemons(
        slots,
        writes,
        probe,
        None,
        authorities=PoolAuthorities(BACKEND),
        host_ports=None,
        image=None,
        ignored_spec_fields=(),
        deadlines=Deadlines(),
    )
    return slots, writes, daemons


@pytest.fixture
async def control(tmp_path):
    control = HangingControl()
    async with serve(control, host="127.0.0.1", port=0, ssl=server_context(tmp_path)) as server:
        control.port = server._server.sockets[0].getsockname()[1]
        yield control
        control.answers.set()


@pytest.mark.parametrize("started_by", ["this replica", "another replica"])
async def test_a_pod_is_there_as_long_as_it_answers_whoever_has_started_it(control, started_by):
    slots, writes, daemons = replica(MemoryCluster())
    made = await writes.make(PodRequest(slot(0), "uid-1", "anna", POOL, "an/image:1", host_port=control.port))
    if started_by == "this replica":
        slots.mark_ready(slot(0), pod_view.uid(made), f"tcp://127.0.0.1:{control.port}")
    assert await daemons.answers(slot(0), "uid-1")
    assert not await daemons.answers(slot(0), "uid-of-another-worker")
    assert not await daemons.answers(slot(1), "uid-1")
    seen = daemons.observe()[slot(0)]
    assert (seen.state, seen.silence) == (DaemonState.READY, None)
    control.answers.clear()
    assert not await daemons.answers(slot(0), "uid-1", fresh=False)
    assert daemons.observe()[slot(0)].silence is not None
    control.answers.set()
    assert await daemons.answers(slot(0), "uid-1")
    assert daemons.observe()[slot(0)].silence is None


async def test_a_pod_that_was_there_before_this_replica_and_hangs_is_not_believed(control):
    slots, writes, daemons = replica(MemoryCluster())
    await writes.make(PodRequest(slot(0), "uid-1", "anna", POOL, "an/image:1", host_port=control.port))
    control.answers.clear()
    assert not await daemons.answers(slot(0), "uid-1")
    assert daemons.observe()[slot(0)].state is DaemonState.STARTING
    assert slots.health.silence(slot(0)) is None
