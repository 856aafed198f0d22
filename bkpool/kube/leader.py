"""Leader election: of several replicas, only the one that holds a Lease object does the work.

A replica takes over another's Lease only after it has seen no change of it for the Lease's whole duration, measured
with its own monotonic clock. It never compares its clock with another machine's. A leader that cannot renew in time
stops before its Lease expires.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound, Unavailable
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.times import micro

log = structlog.get_logger(__name__)

_RENEW_DEADLINE = 2 / 3
"""The part of a Lease's duration after which a leader that could not renew stops, as in client-go (10 of 15 s). Its
work ends in the remaining time, before another replica begins."""
RELEASE_TIMEOUT = 3.0
"""Seconds that a release may take. To wait until the Lease expires is hardly slower."""
_API = "coordination.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class LeaderTimes:
    """The times of an election, in seconds. The defaults of duration and retry are client-go's for controllers."""

    duration: float = 15.0
    """Until a Lease that is not renewed expires; the same for all replicas."""
    renew: float = 5.0
    """Between renewals."""
    retry: float = 2.0
    """Between attempts to get the Lease, or to renew it after a failure."""

    @classmethod
    def of(cls, duration: float) -> Self:
        """The times for a Lease of this duration: it is renewed three times in it.

        With a shorter Lease the attempts come more often. With a longer one they do not come more rarely, so that a
        Lease that was given up is taken as soon.
        """
        default = cls()
        return cls(duration, duration / 3, min(default.retry, duration * default.retry / default.duration))


class LeaderElection:
    """Takes part in the election for one replica.

    Args:
        api: The cluster. Its creator closes it.
        namespace: The namespace of the Lease.
        name: The name of the Lease.
        identity: This replica's name. Two replicas that run at the same time must have different names.
        clock: Monotonic seconds.
        sleep: Waits that many seconds.
        now: The wall clock. It is only written into the Lease, for people to read.
        times: When it renews the Lease, or tries to get it.
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
        times: LeaderTimes = LeaderTimes(),
    ) -> None:
        self._api = api
        self._collection = paths.group(_API, "leases", namespace)
        self._path = paths.group(_API, "leases", namespace, name)
        self._name = name
        self._identity = identity
        self._clock = clock
        self._sleep = sleep
        self._now = now
        self._times = times
        self._other_holder = ""
        """The other replica that held the Lease when it was last read; empty: none."""
        self._version = ""
        self._version_since = 0.0
        self._written: Doc | None = None
        """The Lease as this replica has written it last; None: not known whether it is still so."""
        self._renewed = 0.0
        self._trouble = ""
        self.leading = False
        """Whether the work runs in this replica."""

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs the work while this replica holds the Lease, again and again until cancelled.

        If the Lease is lost, the work is cancelled at once. If the work itself returns or raises, so does this.
        """
        while True:
            while not await self._attempt():
                await self._sleep(self._times.retry)
            log.info("leader.elected", lease=self._name, identity=self._identity)
            if await self._run_while_held(work):
                return
            log.warning("leader.lost", lease=self._name, identity=self._identity)

    async def release(self) -> None:
        """Gives up the Lease, so that another replica can take it at once. Call it after `lead` has ended.

        Raises:
            RuntimeError: The work still runs.
            Unavailable: The Lease could not be written. It expires by itself.
        """
        if self.leading:
            raise RuntimeError("the Lease must not be given up while the work runs")
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT):
                await self._clear_holder()
        except (NotFound, Conflict):
            return  # another replica holds it already, or it was deleted
        except TimeoutError:
            raise Unavailable(
                f"Kubernetes: Lease {self._name} could not be given up within {RELEASE_TIMEOUT:g} s",
                hint="It expires by itself.",
            ) from None

    async def _clear_holder(self) -> None:
        lease = await self._api.get(self._path)
        if lease.get("spec", {}).get("holderIdentity") == self._identity:
            lease["spec"] |= {"holderIdentity": "", "renewTime": micro(self._now()), "leaseDurationSeconds": 1}
            await self._api.replace(self._path, lease)
            log.info("leader.released", lease=self._name, identity=self._identity)

    async def _run_while_held(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Runs the work while the Lease is held; returns whether the work ended by itself."""
        working = asyncio.ensure_future(work())
        tasks: list[asyncio.Future[None]] = [
            working,
            asyncio.create_task(self._renew_until_lost()),
            asyncio.create_task(self._wait_for_deadline()),
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

    async def _renew_until_lost(self) -> None:
        """Renews the Lease; returns when another replica is seen to hold it."""
        pause = self._times.renew
        while True:
            await self._sleep(pause)
            held = await self._attempt()
            if not held and self._other_holder:
                return
            pause = self._times.renew if held else self._times.retry

    async def _wait_for_deadline(self) -> None:
        """Returns when the last renewal is too long ago, even if a request is still waiting for its response."""
        while (left := self._renewed + self._times.duration * _RENEW_DEADLINE - self._clock()) > 0:
            await self._sleep(left)

    async def _attempt(self) -> bool:
        """Tries once to get or renew the Lease; returns whether this replica holds it now."""
        started = self._clock()
        try:
            held = await self._take()
        except Conflict:
            return False  # another replica was faster; the next attempt shows which
        except BkpoolError as error:
            if self._trouble != error.message:
                log.warning("leader.request_failed", lease=self._name, reason=error.message)
            self._trouble = error.message
            return False
        self._trouble = ""
        if held:
            self._renewed = started  # not when the response arrived: the Lease was written before that
        return held

    async def _take(self) -> bool:
        """Gets or renews the Lease. A renewal reads nothing: the write fails if others have changed the Lease."""
        written, self._written = self._written, None
        if written is not None:
            with suppress(Conflict, NotFound):
                self._written = await self._api.replace(self._path, self._with_holder(written))
                return True
        return await self._read_and_take()

    async def _read_and_take(self) -> bool:
        try:
            lease = await self._api.get(self._path)
        except NotFound:
            new = self._with_holder({"metadata": {"name": self._name}})
            self._written = await self._api.create(self._collection, new)
            return True
        holder = lease.get("spec", {}).get("holderIdentity") or ""
        self._other_holder = "" if holder == self._identity else holder
        if self._other_holder and not self._expired(lease):
            return False
        self._written = await self._api.replace(self._path, self._with_holder(lease))
        self._other_holder = ""
        return True

    def _expired(self, lease: Doc) -> bool:
        """Whether this replica has seen no change of another's Lease for the Lease's whole duration."""
        version = lease["metadata"]["resourceVersion"]
        if version != self._version:
            self._version, self._version_since = version, self._clock()
        return self._clock() - self._version_since >= (
            lease["spec"].get("leaseDurationSeconds") or self._times.duration
        )

    def _with_holder(self, lease: Doc) -> Doc:
        """The Lease, with this replica as its holder."""
        spec, now = lease.get("spec") or {}, micro(self._now())
        changed = spec.get("holderIdentity") != self._identity
        times = {"acquireTime": now} if changed else {}
        count = (spec.get("leaseTransitions") or 0) + (1 if changed and spec else 0)
        held = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": round(self._times.duration),
            "renewTime": now,
            "leaseTransitions": count,
        }
        return {**lease, "apiVersion": _API, "kind": "Lease", "spec": spec | times | held}
