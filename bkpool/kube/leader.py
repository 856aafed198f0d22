"""Which of several replicas works: the holder of one Lease object, by compare-and-swap on it.

Another's Lease counts as over only when this replica has seen no change of it for its whole duration by its own
monotonic clock; clocks of other machines are never compared. Whoever cannot renew in time stops first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound, Unavailable
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.times import micro

log = structlog.get_logger(__name__)

DURATION, RENEW, RETRY = 15.0, 5.0, 2.0
"""Seconds: a silent holder's Lease is over after DURATION; it is renewed every RENEW, and tried for every RETRY. The
first and the last are client-go's defaults for controllers."""
_GIVE_UP = 2 / 3
"""The part of DURATION after which a holder that cannot renew stops, as client-go's 10 of 15 s: the rest is for its
work to end before another begins."""
FAREWELL = 3.0
"""Seconds that a release may take: beyond it, waiting for the Lease to run out is hardly slower."""
_API = "coordination.k8s.io/v1"


class LeaderElection:
    """One replica's part in the election.

    Args:
        api: The cluster. Whoever made it closes it.
        namespace: Where the Lease is.
        name: Of the Lease.
        identity: This replica's name; no two that live at once may share it.
        clock: Seconds that only go forward.
        sleep: Waits that many of them.
        now: The time that is written for people to read.
        duration: Seconds; the same at all replicas.
        renew: Seconds between renewals.
        retry: Seconds between attempts, to get it and to renew it after a failure.
    """

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        name: str,
        identity: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        duration: float = DURATION,
        renew: float = RENEW,
        retry: float = RETRY,
    ) -> None:
        self._api = api
        self._collection = paths.group(_API, "leases", namespace)
        self._path = paths.group(_API, "leases", namespace, name)
        self._name = name
        self._identity = identity
        self._clock = clock
        self._sleep = sleep
        self._now = now
        self._duration = duration
        self._renew = renew
        self._retry = retry
        self._other = ""
        """Who else holds it, as of the last look."""
        self._version = ""
        self._version_since = 0.0
        self._renewed = 0.0
        self._trouble = ""
        self.leading = False
        """Whether the work runs here."""

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs the work whenever this replica holds the Lease, until cancelled.

        A lost Lease cancels the work at once. Returns, or raises, when the work does so by itself.
        """
        while True:
            while not await self._attempt():
                await self._sleep(self._retry)
            log.info("leader.elected", lease=self._name, identity=self._identity)
            if await self._work(work):
                return
            log.warning("leader.lost", lease=self._name, identity=self._identity)

    async def release(self) -> None:
        """Gives the Lease up, so that another can take it at once. Call it when `lead` has ended.

        Raises:
            RuntimeError: The work still runs.
            Unavailable: The Lease could not be written; it runs out by itself.
        """
        if self.leading:
            raise RuntimeError("the Lease is given up only after the work has ended")
        try:
            async with asyncio.timeout(FAREWELL):
                await self._give_up()
        except (NotFound, Conflict):
            return  # it is another's already, or nobody's
        except TimeoutError:
            raise Unavailable(
                f"Kubernetes: Lease {self._name} could not be given up within {FAREWELL:g} s", hint="It runs out."
            ) from None

    async def _give_up(self) -> None:
        lease = await self._api.get(self._path)
        if lease.get("spec", {}).get("holderIdentity") == self._identity:
            lease["spec"] |= {"holderIdentity": "", "renewTime": micro(self._now()), "leaseDurationSeconds": 1}
            await self._api.replace(self._path, lease)
            log.info("leader.released", lease=self._name, identity=self._identity)

    async def _work(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Runs the work as long as the Lease is held; whether it ended by itself."""
        working = asyncio.ensure_future(work())
        tasks: list[asyncio.Future[None]] = [
            working,
            asyncio.create_task(self._renewing()),
            asyncio.create_task(self._running_out()),
        ]
        self.leading = True
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            by_itself = working.done()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.leading = False
        if by_itself:
            await working
        return by_itself

    async def _renewing(self) -> None:
        """Renews; returns when the Lease is seen in another's hand."""
        pause = self._renew
        while True:
            await self._sleep(pause)
            held = await self._attempt()
            if not held and self._other:
                return
            pause = self._renew if held else self._retry

    async def _running_out(self) -> None:
        """Returns when the last renewal is too long ago, whatever the server does meanwhile."""
        while (left := self._renewed + self._duration * _GIVE_UP - self._clock()) > 0:
            await self._sleep(left)

    async def _attempt(self) -> bool:
        """One try to get or to renew the Lease; whether this replica holds it now."""
        asked = self._clock()
        try:
            held = await self._take()
        except Conflict:
            return False  # another was faster: the next look shows whom
        except BkpoolError as error:
            if self._trouble != error.message:
                log.warning("leader.cannot_ask", lease=self._name, reason=error.message)
            self._trouble = error.message
            return False
        self._trouble = ""
        if held:
            self._renewed = asked  # not when it was answered: the server's count began earlier
        return held

    async def _take(self) -> bool:
        try:
            lease = await self._api.get(self._path)
        except NotFound:
            await self._api.create(self._collection, self._lease({"metadata": {"name": self._name}}))
            return True
        holder = lease.get("spec", {}).get("holderIdentity") or ""
        self._other = "" if holder == self._identity else holder
        if self._other and not self._over(lease):
            return False
        await self._api.replace(self._path, self._lease(lease))
        self._other = ""
        return True

    def _over(self, lease: Doc) -> bool:
        """Whether another's Lease has not changed for its whole duration, as seen from here."""
        version = lease["metadata"]["resourceVersion"]
        if version != self._version:
            self._version, self._version_since = version, self._clock()
        return self._clock() - self._version_since >= (lease["spec"].get("leaseDurationSeconds") or self._duration)

    def _lease(self, lease: Doc) -> Doc:
        """The Lease with this replica as its holder."""
        spec, now = lease.get("spec") or {}, micro(self._now())
        changed = spec.get("holderIdentity") != self._identity
        times = {"acquireTime": now} if changed else {}
        count = (spec.get("leaseTransitions") or 0) + (1 if changed and spec else 0)
        held = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": round(self._duration),
            "renewTime": now,
            "leaseTransitions": count,
        }
        return {**lease, "apiVersion": _API, "kind": "Lease", "spec": spec | times | held}
