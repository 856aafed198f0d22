"""Which idle workers are started again, because their daemon was started with an earlier spec of their pool.

They are replaced a few at a time, so that enough others stay ready, whatever has changed: one pool's spec, or the way
in which a new version of bkpool makes the digest. Leased workers follow when their lease ends (`lease_end`).
"""

from __future__ import annotations

from bkpool.core.names import Slot
from bkpool.core.observation import Snapshot, ready_observation
from bkpool.core.placement import last_used
from bkpool.core.worker import Phase, Worker

_SHARE = 4
"""At most one of so many idle workers of a pool is down for this, but at least one."""


def to_replace(snapshot: Snapshot, idle: list[Worker]) -> set[Slot]:
    """The slots whose daemon is stopped now. Then it is started again as today's spec wants it.

    A daemon whose builds reach what the spec does not open is stopped at once. Of the others, the least recently used
    come first. If new ones do not start, they count as down, so the last ready ones are kept.

    Args:
        snapshot: The pool.
        idle: Its workers without a lease that are to stay.
    """
    seen = {worker.slot: ready_observation(worker, snapshot.observed.get(worker.slot)) for worker in idle}
    ready = {slot: up for slot, up in seen.items() if up is not None and slot not in snapshot.busy}
    at_once = {slot for slot, up in ready.items() if up.reaches_other}
    down = len(idle) - len(ready) + len(at_once)
    most = min(max(1, len(idle) // _SHARE) - down, snapshot.restarts_left)
    outdated = sorted((w for w in idle if w.slot in ready and ready[w.slot].outdated), key=last_used)
    gradually = [worker.slot for worker in outdated if worker.slot not in at_once]
    return at_once | set(gradually[: max(0, most)])


def out_of_use(worker: Worker) -> Worker:
    """The worker as it is stored before its daemon is stopped: who leases it now waits for the next daemon."""
    return worker.with_status(phase=Phase.PENDING, endpoint=None, pod_ip=None)
