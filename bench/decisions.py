"""Measures one decision about a pool: what `decide` takes from scratch, and a plan after one change.

It is pure: nothing is carried out, and nothing else runs. It judges nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from bkpool.core.names import Slot
from bkpool.core.observation import DaemonState, Observation, Snapshot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.reconcile.actions import Plan
from bkpool.core.reconcile.decide import decide, state_of
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker, new_worker

WORKERS = (1000, 3000)
_NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
_UNUSED_SINCE = _NOW - timedelta(hours=1)


def by_change(counts: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """Times decisions about pools with so many workers, by what has changed. Times are in milliseconds."""
    rows = []
    for count in counts:
        for what, decision in decisions(count).items():
            rows.append({"workers": count, "what": what, "ms": [_took(decision) * 1000 for _ in range(runs)]})
    return rows


def decisions(count: int) -> dict[str, Callable[[], Plan]]:
    workers = tuple(_worker(number) for number in range(count))
    steady = _snapshot(workers, at_least=count, at_most=count)
    return {
        "steady": partial(decide, steady, _NOW),
        "one worker has changed": _after_one_change(steady),
        "all workers are surplus": partial(decide, _snapshot(workers, at_least=0, at_most=count), _NOW),
        "max lowered to 1": partial(decide, _snapshot(workers, at_least=0, at_most=1), _NOW),
        "floor from nothing": partial(decide, _snapshot((), at_least=count, at_most=count), _NOW),
    }


def _after_one_change(snapshot: Snapshot) -> Callable[[], Plan]:
    """A plan of a state that has planned before, and of which one worker has changed since."""
    state, moment, worker = state_of(snapshot), Moment(_NOW), snapshot.workers[-1]
    state.plan(moment)

    def change() -> Plan:
        state.set_worker(worker.slot, worker)
        return state.plan(moment)

    return change


def _took(work: Callable[[], Plan]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _snapshot(workers: tuple[Worker, ...], *, at_least: int, at_most: int) -> Snapshot:
    observed = {
        worker.slot: Observation(worker.uid, DaemonState.READY, worker.status.endpoint or "", None)
        for worker in workers
    }
    return Snapshot(_pool(at_least, at_most), workers, observed, caches={})


def _pool(at_least: int, at_most: int) -> Pool:
    spec = PoolSpec.model_validate({"scaling": {"min": at_least, "max": at_most}})
    return Pool(metadata=Metadata(name="p", uid="pool", resource_version="1", generation=1), spec=spec)


def _worker(number: int) -> Worker:
    """An idle worker that nobody has used for long."""
    made = new_worker(Slot("default", "p", number), _pool(0, 1), None, {})
    made = made.but(metadata=made.metadata.but(uid=f"uid-{number}", resource_version="1"))
    return made.with_status(phase=Phase.IDLE, endpoint=f"unix:///{number}", last_activity_at=_UNUSED_SINCE)
