"""A copy of the heartbeats of gateways in memory, kept up to date by list and watch.

A cluster whose definitions or rights are of an earlier version does not have them: then the copy stays empty, and
nothing else fails. It never writes to the store.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import structlog

from bkpool.core.backoff import Backoff
from bkpool.core.errors import DiskFull, Forbidden, Gone, NotFound, Unauthenticated, Unavailable
from bkpool.core.gateway_heartbeat import ABSENT, GatewayHeartbeat, HeartbeatVersion
from bkpool.core.names import Key
from bkpool.core.subscribers import Subscribers
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.store import Listing, Store
from bkpool.store.kind_copy import KindCopy, where

log = structlog.get_logger(__name__)

_LONGEST_PAUSE = 60.0
"""Seconds until a copy that is refused is tried again: somebody may apply the manifests meanwhile."""
_SOON = 5.0
"""The longest pause while heartbeats are still taken to be followed."""
_LASTS = 20.0
"""Seconds for which what was followed must be refused without interruption until it counts. An API server that
restarts, or is weak, refuses for a moment. Two changes of the rights of all gateways would only burden it more."""
_KNOWN_WITHIN = 30.0
"""Seconds for which work waits for the first answer. A request takes 15 at most, and is repeated."""
_RELIED_ON = 120.0
"""Seconds for which gateways may rely on heartbeats that this process may not read any more: 60 s until no gateway
may write them, and 50 s for which a gateway relies on one."""
_REFUSED = (Forbidden, NotFound)
_TRANSIENT = (Gone, Unavailable, DiskFull, Unauthenticated)


class Heartbeats:
    """The heartbeats as they were a moment ago.

    Args:
        store: Has the objects.
        pause: Waits that many seconds before the store is asked again.
        jitter: Returns a number from 0 to 1: how much of the longest allowed pause is waited.
        seconds: Monotonic time.
    """

    def __init__(
        self,
        store: Store,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._pause = pause
        self._jitter = jitter
        self._seconds = seconds
        self._copy = KindCopy(GatewayHeartbeat, store.scopes(GatewayHeartbeat), self._changed)
        self._asked: set[str | None] = set()
        self._followed: set[str | None] = set()
        self._refused_since: dict[str | None, float] = {}
        self._unfollowed_since: dict[str | None, float] = {}
        self._subscribers: Subscribers[[Key]] = Subscribers()
        self._followed_subscribers: Subscribers[[]] = Subscribers()
        self.known = self._copy.readable
        """Those that can be read, by their names."""
        self.answered = asyncio.Event()
        """Set once the store has said for all namespaces whether it has them."""

    async def run(self) -> None:
        """Keeps the copy up to date until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for scope in self._copy.scopes:
                tasks.create_task(self._follow(scope))

    async def until_known(self) -> None:
        """Waits for `answered`, but not for ever: without an answer heartbeats count as not followed for now."""
        try:
            async with asyncio.timeout(_KNOWN_WITHIN):
                await self.answered.wait()
        except TimeoutError:
            log.warning("heartbeats.not_known", after_seconds=_KNOWN_WITHIN)

    def followed_in(self, namespace: str) -> bool:
        """Whether this process sees the heartbeats of a namespace. Where it does not, no gateway must rely on one."""
        return bool(self._followed & {namespace, None})

    def subscribe(self, callback: Callable[[Key], None]) -> Callable[[], None]:
        """Calls back with the name of each heartbeat that has changed. Returns a function that unsubscribes."""
        return self._subscribers.add(callback)

    def on_followed(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back when `followed_in` may have changed. Returns a function that unsubscribes."""
        return self._followed_subscribers.add(callback)

    async def is_still(self, key: Key, judged: HeartbeatVersion | None) -> bool:
        """Asks the store itself whether a heartbeat is still as it was judged. The copy is corrected.

        Args:
            key: Its name.
            judged: Its version then. None: nobody has seen it, nor asked for it. If there is none then, it may have
                been deleted unseen, so the answer is no, and whoever subscribes learns that there is none.

        Raises:
            Unavailable: The store does not answer, or does not allow the question while gateways may rely on it.
        """
        try:
            found = await self._store.get(GatewayHeartbeat, *key)
        except (NotFound, UnreadableObject):
            if judged == ABSENT and key not in self.known:
                return True
            self._take_absence(key)
            return False
        except Forbidden as error:
            if self._is_given_up(key.namespace):
                return True
            raise Unavailable(f"the heartbeat of gateway {key} cannot be read: {error.message}") from None
        self._copy.applied(found)
        return judged == HeartbeatVersion.of(found)

    def _is_given_up(self, namespace: str) -> bool:
        """Whether heartbeats have not been followed there for so long that no gateway relies on one."""
        since = self._unfollowed_since.get(namespace if namespace in self._copy.scopes else None)
        return since is not None and self._seconds() - since >= _RELIED_ON

    async def _follow(self, scope: str | None) -> None:
        def listed(_listing: Listing[GatewayHeartbeat]) -> None:
            self._note(scope, followed=True)

        def goes_on(error: Exception, _seconds: float) -> bool:
            if isinstance(error, _REFUSED):
                self._note_refusal(scope, error.message)
                return True
            self._refused_since.pop(scope, None)
            if isinstance(error, _TRANSIENT):
                log.warning("heartbeats.interrupted", **where(scope), reason=error.message)
                return True
            return False

        async def pause(seconds: float) -> None:
            await self._pause(min(seconds, _SOON) if scope in self._followed else seconds)

        backoff = Backoff(_LONGEST_PAUSE, jitter=self._jitter)
        await self._copy.follow(self._store, scope, goes_on, listed, backoff=backoff, pause=pause)

    def _note_refusal(self, scope: str | None, reason: str) -> None:
        now = self._seconds()
        since = self._refused_since.setdefault(scope, now)
        if scope in self._followed and now - since < _LASTS:
            return
        if scope in self._followed or scope not in self._asked:
            log.info("heartbeats.not_followed", **where(scope), reason=reason)
        self._note(scope, followed=False)

    def _note(self, scope: str | None, *, followed: bool) -> None:
        changed = (scope in self._followed) is not followed
        (self._followed.add if followed else self._followed.discard)(scope)
        if followed:
            self._refused_since.pop(scope, None)
            self._unfollowed_since.pop(scope, None)
        else:
            self._unfollowed_since.setdefault(scope, self._seconds())
        self._asked.add(scope)
        if self._asked == {*self._copy.scopes}:
            self.answered.set()
        if changed:
            self._followed_subscribers.notify()

    def _take_absence(self, key: Key) -> None:
        """Notes that there is no heartbeat of this name, or none that can be read."""
        if not self._copy.deleted(key):
            self._subscribers.notify(key)

    def _changed(self, found: GatewayHeartbeat | Unreadable, _before: Unreadable | None) -> None:
        self._subscribers.notify(found.key)
