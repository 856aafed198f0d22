"""A lease registry of a gateway that records the calls it gets, and answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from bkpool.core.errors import BkpoolError
from bkpool.gateway.session.lease_table import LeaseRoute

_WAIT = 60.0
"""Seconds that `wait_for` waits before the test fails."""


class RecordingRegistry:
    """Registers nothing anywhere."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        """The method and the lease's id of each call but `report_worker` and `find`."""
        self.connections: list[int] = []
        """The number of connections in each registration and renewal."""
        self.beats: list[dict[str, int]] = []
        """The leases of each heartbeat."""
        self.beat_error: BkpoolError | None = None
        """Raised by each heartbeat."""
        self.silences: list[float | None] = []
        """What was reported of workers."""
        self.lookups: list[str] = []
        """The token digests of `find`."""
        self.on_find: Callable[[], None] = lambda: None
        self.error: BkpoolError | None = None
        """Raised by each call."""
        self.may_answer = asyncio.Event()
        """While it is not set, no call returns."""
        self.may_answer.set()
        self._changed = asyncio.Condition()

    async def register(self, route: LeaseRoute, connections: int) -> None:
        self.connections.append(connections)
        await self._record("register", route)

    async def renew(self, route: LeaseRoute, connections: int) -> None:
        self.connections.append(connections)
        await self._record("renew", route)

    async def beat(self, loop: object, leases: Mapping[str, int]) -> None:
        await self.may_answer.wait()
        async with self._changed:
            self.beats.append(dict(leases))
            self._changed.notify_all()
        error = self.beat_error or self.error
        if error is not None:
            raise error

    async def wait_for_beats(self, count: int) -> None:
        """Waits for this many heartbeats."""
        async with asyncio.timeout(_WAIT), self._changed:
            await self._changed.wait_for(lambda: len(self.beats) >= count)

    async def withdraw(self, route: LeaseRoute) -> None:
        await self._record("withdraw", route)

    async def report_worker(self, route: LeaseRoute, silent_for: float | None) -> None:
        self.silences.append(silent_for)

    async def find(self, token_sha256: str) -> None:
        self.lookups.append(token_sha256)
        await self.may_answer.wait()
        self.on_find()
        if self.error is not None:
            raise self.error

    async def wait_for(self, method: str, count: int = 1) -> None:
        """Waits for this many calls of this method."""
        async with asyncio.timeout(_WAIT), self._changed:
            await self._changed.wait_for(lambda: [call[0] for call in self.calls].count(method) >= count)

    async def _record(self, method: str, route: LeaseRoute) -> None:
        await self.may_answer.wait()
        async with self._changed:
            self.calls.append((method, route.lease_id))
            self._changed.notify_all()
        if self.error is not None:
            raise self.error
