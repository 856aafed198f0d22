"""Forgets what an earlier run of this appliance knew and this one has not seen: rule 14 (docs/rules.md#r14).

It runs after the daemons that still answer were found, and before anybody is served. It stops and starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import structlog

from bkpool.core.errors import Conflict, NotFound
from bkpool.core.names import Slot
from bkpool.core.observation import Observation, ready_observation
from bkpool.core.worker import Phase
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


async def forget_unseen_endpoints(store: Store, mirror: Mirror, observed: Mapping[Slot, Observation]) -> None:
    """Takes the endpoint of each worker away whose daemon was not found. The controller starts it again.

    Args:
        store: Has the workers.
        mirror: The copy of the store; it gets what is written.
        observed: The daemons that were found.
    """
    for worker in list(mirror.workers.values()):
        if worker.status.endpoint is None or ready_observation(worker, observed.get(worker.slot)):
            continue
        phase = Phase.PENDING if worker.lease is None else Phase.PROVISIONING
        unseen = worker.noted_answering().with_status(phase=phase, endpoint=None, pod_ip=None)
        log.info("worker.not_found", worker=str(worker.key))
        with suppress(Conflict, NotFound):  # another program has changed it after us
            mirror.apply(await store.replace_status(unseen))
