"""Runs buildkitd daemons and keeps their caches: as processes on this machine, or as pods in a cluster.

Two protocols describe this to other rooms: `Daemons` (start, stop, observe) and `Caches` (list, own, wipe). A runtime
offers both. It never decides what to run, and knows nothing of leases.
"""

from __future__ import annotations

from typing import Protocol

from bkpool.core.observation import DaemonState, Observation, WorkerCapacity
from bkpool.workers.caches import Caches
from bkpool.workers.daemons import Daemons, ReportWaiting

__all__ = ["Caches", "DaemonState", "Daemons", "Observation", "ReportWaiting", "Runtime", "WorkerCapacity"]


class Runtime(Protocol):
    """A method to run workers. Its daemons and caches share the locks of their slots."""

    @property
    def daemons(self) -> Daemons:
        """Starts, stops and observes daemons."""

    @property
    def caches(self) -> Caches:
        """Lists, assigns and wipes caches."""

    async def adopt(self) -> None:
        """Finds what earlier runs have left: takes over daemons that answer, and completes interrupted work."""

    async def close(self, *, stop_workers: bool) -> None:
        """Ends all background work.

        Args:
            stop_workers: Also ends every daemon that could not be adopted later.
        """
