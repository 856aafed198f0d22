"""The time after a rotation of the CA of clients and gateways, in which the former CA is trusted together with it.

A caller with an earlier lease trusts only the former CA. So gateways show a certificate of the former CA until the
last such lease has ended, and callers get both. New leases are signed by the new CA only when every gateway trusts
it. It reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.pki.authority import Authority

ROLLOUT = timedelta(hours=1)
"""How long after a rotation the former CA signs the certificates of leases. By then every replica has read the new
CA, and every gateway trusts both. What is leased in this time counts as an earlier lease."""
_LINGER = timedelta(minutes=5)
"""How much longer callers get both CAs: until then every gateway has changed its certificate."""


@dataclass(frozen=True, slots=True)
class Former:
    """The CAs that a rotation has replaced."""

    authority: Authority
    """Of gateways and clients."""
    rotated_at: datetime
    backend: Authority | None = None
    """The backend CA; None where workers are processes."""


class Rotation:
    """Which CA signs the certificates of gateways, and which CAs are trusted. It may be asked again and again.

    Args:
        current: The CA that signs the certificates of new leases.
        former: What there was before; None if there was no rotation.
        now: The clock.
    """

    def __init__(self, current: Authority, former: Former | None, now: Callable[[], datetime]) -> None:
        self.current = current
        self._former = former
        self._now = now
        self._over_since: datetime | None = None
        """When it was first seen that the former CA is not needed any more."""

    @property
    def lease_signer(self) -> Authority:
        """The CA that signs the client certificates of new leases."""
        former = self._former
        before = former is not None and self._now() < former.rotated_at + ROLLOUT
        return former.authority if former is not None and before else self.current

    def overlaps(self, workers: Iterable[Worker | Unreadable]) -> bool:
        """Whether the former CA is still needed. Once it is not, it never is again.

        Args:
            workers: All workers, with their leases. One that cannot be read may have an earlier one.
        """
        if self._former is None:
            return False
        now, end = self._now(), self._former.rotated_at + ROLLOUT
        if now < end or any(_may_need(worker, end) for worker in workers):
            self._over_since = None
            return True
        self._over_since = self._over_since or now
        if now >= self._over_since + _LINGER:
            self._former = None
        return False

    def signer(self, workers: Iterable[Worker | Unreadable]) -> Authority:
        """The CA that signs the certificates of gateways. The argument is as for `overlaps`."""
        former = self._former
        return former.authority if former is not None and self.overlaps(workers) else self.current

    def trusted_by_gateways(self, workers: Iterable[Worker | Unreadable]) -> bytes:
        """The CAs of clients' certificates in PEM, that of `signer` first. The argument is as for `overlaps`."""
        former = self._former
        if former is not None and self.overlaps(workers):
            return former.authority.cert_pem + self.current.cert_pem
        return self.current.cert_pem

    def trusted_by_callers(self, workers: Iterable[Worker | Unreadable]) -> bytes:
        """The CAs of gateways' certificates in PEM, for a new lease. The argument is as for `overlaps`."""
        self.overlaps(workers)  # forgets the former CA when its time is over
        former = self._former
        return self.current.cert_pem + (former.authority.cert_pem if former is not None else b"")

    @property
    def next_check(self) -> datetime | None:
        """When `overlaps` may change although no lease has ended; None: never."""
        return None if self._former is None else max(self._former.rotated_at + ROLLOUT, self._now() + _LINGER)


def _may_need(worker: Worker | Unreadable, end: datetime) -> bool:
    if isinstance(worker, Unreadable):
        return worker.may_be_leased
    return worker.lease is not None and worker.lease.allocated_at < end


def may_rotate_again(former: Former | None, workers: Iterable[Worker | Unreadable], now: datetime) -> bool:
    """Whether nothing needs the CA that the last rotation has replaced any more."""
    return former is None or not Rotation(former.authority, former, lambda: now).overlaps(workers)
