"""How long the registration of a gateway is valid, on the clock of the one who reads it (rule 10, docs/rules.md#r10).

The clocks of two machines may differ by more than a registration lives, so they are not compared. The reader counts
from the moment when it saw an entry for the first time, or saw it change. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import NamedTuple

from bkpool.core.names import Key
from bkpool.core.worker import GatewayRegistration, Worker

REGISTRATION_LIFE = timedelta(seconds=60)
"""A registration that did not change for this long has expired."""


class RegistrationKey(NamedTuple):
    """Which registration: of this gateway, for this lease, on this worker."""

    worker: Key
    gateway: str
    lease_id: str


Expiries = Mapping[RegistrationKey, datetime]
"""When each registration expires unless it changes. One that is missing was not seen before: it is valid."""
NONE_SEEN: Expiries = MappingProxyType({})


class SeenRegistrations:
    """Remembers since when each registration has been as it is."""

    def __init__(self) -> None:
        self._seen: dict[RegistrationKey, tuple[GatewayRegistration, float]] = {}

    def look(self, workers: Iterable[Worker], now: datetime, seconds: float) -> Expiries:
        """Takes note of all registrations, and forgets those that are gone.

        Args:
            workers: All workers, as they are known now.
            now: The time, in which the answer is given.
            seconds: Monotonic time, by which the age of a registration is judged.
        """
        before, self._seen = self._seen, {}
        expiries: dict[RegistrationKey, datetime] = {}
        for worker in workers:
            for entry in worker.status.gateways:
                key = RegistrationKey(worker.key, entry.gateway, entry.lease_id)
                known, since = before.get(key, (None, seconds))
                if known != entry:
                    since = seconds
                self._seen[key] = entry, since
                expiries[key] = now + REGISTRATION_LIFE - timedelta(seconds=seconds - since)
        return expiries


def live_registrations(
    worker: Worker, expiries: Expiries, now: datetime
) -> list[tuple[GatewayRegistration, datetime]]:
    """The registrations of a worker that have not expired, each with the time at which it does."""
    found = []
    for entry in worker.status.gateways:
        expires_at = expiries.get(RegistrationKey(worker.key, entry.gateway, entry.lease_id), now + REGISTRATION_LIFE)
        if expires_at > now:
            found.append((entry, expires_at))
    return found
