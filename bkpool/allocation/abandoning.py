"""Ends leases that no caller has, in the background, until the store has written that.

It ends what it is told to. Whether a lease is needed is known to `deliveries`, and to the lease itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from bkpool.allocation.leases import LeaseService, lease_facts
from bkpool.core.errors import DiskFull, Unavailable
from bkpool.core.worker import Worker

log = structlog.get_logger(__name__)

ABANDON_INTERVAL = 2.0
"""Seconds until a lease that nobody knows of is ended again, if the store could not write that."""


class Abandoner:
    """The leases of this replica that are being ended because no caller has them.

    Args:
        leases: Ends them.
    """

    def __init__(self, leases: LeaseService) -> None:
        self._leases = leases
        self._closing = asyncio.Event()
        self._ending: dict[str, asyncio.Task[None]] = {}
        """The leases that are being ended, by id."""

    async def close(self) -> None:
        """Waits until they have ended, or cannot be ended now."""
        self._closing.set()
        while self._ending:
            await asyncio.gather(*self._ending.values(), return_exceptions=True)
            # Their callbacks remove them, and since Python 3.12 gather does not pause if all are done already.
            await asyncio.sleep(0)

    def abandon(self, worker: Worker) -> None:
        """Ends the worker's lease in the background, because no caller has it.

        Args:
            worker: The worker, as this replica claimed it.
        """
        lease_id = worker.held_lease.id
        task = asyncio.get_running_loop().create_task(self._abandon(worker))
        self._ending[lease_id] = task

        def ended(_task: asyncio.Task[None]) -> None:
            if self._ending.get(lease_id) is task:
                del self._ending[lease_id]

        task.add_done_callback(ended)

    async def wait_if_ending(self, worker: Worker) -> bool:
        """Whether the worker's lease is being ended at this moment. If so, returns when that is done."""
        task = self._ending.get(worker.held_lease.id)
        if task is None:
            return False
        await asyncio.wait([task])
        return True

    async def _abandon(self, worker: Worker) -> None:
        """Tries again while the store has no room or does not answer.

        If this process ends before that, the controller ends the lease later: nobody renews it any more.
        """
        while True:
            try:
                await self._leases.abandon(worker)
            except (DiskFull, Unavailable) as error:
                log.warning("lease.not_abandoned", **lease_facts(worker), reason=error.message)
                if self._closing.is_set():
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(ABANDON_INTERVAL):
                        await self._closing.wait()
            else:
                return
