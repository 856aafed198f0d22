"""What the rest of bkpool may ask about the buildkitd daemons of workers: processes on this machine, or pods.

Daemons never decide. They bring a slot to the requested state, and guarantee one thing by themselves: no
daemon ever runs on the cache of another owner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

from bkpool.core.names import Slot
from bkpool.core.observation import Observation, WorkerCapacity
from bkpool.core.pool import Pool, PoolSpec

ReportWaiting = Callable[[str], Awaitable[None]]
"""Called with what a start waits for, each time that this changes; with "" when it waits for nothing any more."""


class Daemons(Protocol):
    """At most one buildkitd in each slot. Slots are independent. Calls for one slot run one after another."""

    @property
    def capacity(self) -> WorkerCapacity | None:
        """How many workers of all pools can run at once; None: as many as there are resources."""

    @property
    def starts_at_once(self) -> int:
        """How many may be starting until no worker without a lease is started. One that is leased does not wait."""

    @property
    def ignored_spec_fields(self) -> Collection[str]:
        """Paths below a pool's `spec` that nothing reads where these daemons run, with everything below them."""

    def ignored_config(self, spec: PoolSpec) -> list[str]:
        """Paths below `spec` of what these daemons do not take from `spec.buildkitConfig`."""

    def observe(self) -> Mapping[Slot, Observation]:
        """What is known of each slot that is not empty. It comes from memory, without I/O."""

    def seen(self, slot: Slot) -> Observation | None:
        """What is known of one slot; None: it is empty. It comes from memory, without I/O."""

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back with a slot, in the event loop, whenever what `observe()` says of it may have changed.

        Returns:
            A function that unsubscribes.
        """

    async def watch_health(self) -> None:
        """Asks all daemons that are up again and again whether they answer, until it is cancelled.

        `Observation.silence` shows those that do not. Their processes or pods are left alone.
        """

    async def answers(self, slot: Slot, worker_uid: str, *, fresh: bool = True) -> bool:
        """Whether a worker's daemon answers now, within seconds. One that this process has not seen yet does not.

        Args:
            slot: Where it is.
            worker_uid: The uid of the worker.
            fresh: An answer of a moment ago counts as well.
        """

    async def start(
        self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, report_waiting: ReportWaiting
    ) -> str:
        """Starts buildkitd in a slot, and waits until it answers a call.

        A cache of another owner is wiped before. If the daemon runs already, for this worker and owner, nothing is
        started.

        Args:
            slot: Where to start it.
            worker_uid: The uid of the worker that it is for.
            owner: Digest of the owner of the cache. None: nobody holds the worker yet, and a cache that has an owner
                keeps them.
            pool: The worker's pool.
            report_waiting: Told what the start waits for.

        Returns:
            The endpoint: `unix:///path` or `tcp://address:port`.

        Raises:
            WorkerFailed: It did not start; `log_tail` of the error has the end of buildkitd's log.
            HostFault: This machine lacks something; the hint says what.
        """

    async def clear_history(self, slot: Slot) -> None:
        """Clears the build history of a slot whose holder has gone, so that the next one does not read it.

        Afterwards the history is empty, or no daemon runs. A start on a cache of the whole pool begins with an empty
        history, too (`core.cache_owner.history_ends_with_lease`).
        """

    async def stop(self, slot: Slot, *, at_once: bool = False) -> None:
        """Ends the daemon in a slot. The cache stays. Does nothing if there is no daemon.

        Args:
            slot: Which slot.
            at_once: Running builds get no time to finish.
        """

    async def protect(self, slot: Slot, *, held: bool) -> None:
        """Asks others to leave a daemon alone while its worker is leased. `Observation.protected` shows it."""

    async def follow(self, pool: Pool) -> None:
        """Applies a changed spec to what the daemons of a pool share.

        Daemons that cannot follow it are observed as outdated (`Observation.outdated`, `reaches_other`).

        Raises:
            WorkerFailed: It cannot be applied; the message names the field.
        """
