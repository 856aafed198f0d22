"""Keeps the rights of the pools' gateways, before and apart from everything else that a gateway needs.

A gateway that writes heartbeats which the controller does not see relies on what nobody counts. So where heartbeats
are not followed any more, all Roles change first, whatever else is wrong with a pool (docs/decisions/0036). It never
touches a Service, a certificate or a pod.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import structlog

from bkpool.controller.pool_gateway_state import GatewayState
from bkpool.core.backoff import Backoff
from bkpool.core.errors import BkpoolError
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.kube import Doc
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

RIGHTS = ("Role", "RoleBinding")
"""The kinds that are kept here."""
_CONCURRENCY = 16
"""Pools whose rights are applied at the same time: hundreds of them in a few seconds."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 10.0
"""Seconds until a right that could not be taken away is tried again. Gateways may go on to rely on it meanwhile."""


class GatewayRights:
    """The rights of all pools' gateways.

    Args:
        mirror: Has the pools, and knows where heartbeats are followed.
        states: What is known of each pool's gateway.
        objects: Describes all objects of a pool's gateway as they should be at the moment.
        ensure: Applies one of them, unless it is as it was applied last.
    """

    def __init__(
        self,
        mirror: Mirror,
        states: Mapping[Key, GatewayState],
        objects: Callable[[Pool], list[Doc]],
        ensure: Callable[[Doc, GatewayState], Awaitable[None]],
    ) -> None:
        self._mirror = mirror
        self._states = states
        self._objects = objects
        self._ensure = ensure
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(_CONCURRENCY)

    async def apply(self, pool: Pool, state: GatewayState) -> None:
        """Applies the rights of one pool's gateways.

        Raises:
            BkpoolError: They cannot be applied.
        """
        async with state.rights:  # so that no earlier description is applied after a later one
            for doc in self._objects(pool):
                if doc["kind"] in RIGHTS:
                    await self._ensure(doc, state)

    def look_again(self) -> None:
        """Makes `run` look at all pools: where heartbeats are followed may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Takes the right to write heartbeats away from all gateways whose heartbeats are not followed."""
        backoff = Backoff(_LONGEST_PAUSE, first=_FIRST_PAUSE)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if all(await asyncio.gather(*map(self._take_away, list(self._states)))):
                backoff.succeeded()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff.failed()):
                    await self._wake.wait()
            self._wake.set()

    async def _take_away(self, key: Key) -> bool:
        """Returns whether the pool's gateways have no right that they must not have."""
        async with self._slots:
            pool, state = self._mirror.pools.get(key), self._states.get(key)
            if pool is None or state is None or self._mirror.heartbeats.followed_in(key.namespace):
                return True
            try:
                await self.apply(pool, state)
            except BkpoolError as error:
                log.warning("pool.gateway_rights_not_applied", pool=str(key), reason=error.message)
                return False
            except Exception:
                log.exception("pool.gateway_rights_crashed", pool=str(key))
                return False
            return True
