"""How long the registration of a gateway is valid, on the clock of the one who reads it (rule 10, docs/rules.md#r10).

The clocks of two machines may differ by more than a registration lives, so they are not compared. The reader counts
from the moment when it saw an entry for the first time, or saw it change. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import NamedTuple, Protocol

from bkpool.core.names import Key
from bkpool.core.worker import GatewayRegistration, Worker

REGISTRATION_LIFE = timedelta(seconds=60)
"""A registration that did not change for this long has expired."""


class RegistrationKey(NamedTuple):
    """Which registration: of this gateway, for this lease, on this worker."""

    worker: Key
    gateway: str
    lease_id: str


class Expiries(Protocol):
    """When each registration expires unless it changes."""

    def get(self, key: RegistrationKey, default: datetime, /) -> datetime:
        """When this one does; the default if it was not seen before, so that it is valid."""


NONE_SEEN: Expiries = MappingProxyType({})


class SeenRegistrations:
    """Remembers since when each registration has been as it is."""

    def __init__(self) -> None:
        self._seen: dict[Key, dict[RegistrationKey, tuple[GatewayRegistration, float]]] = {}

    def look(self, key: Key, worker: Worker | None, seconds: float) -> None:
        """Takes note of the registrations on a worker that has changed, and forgets those that are gone.

        Args:
            key: The worker's name.
            worker: The worker as it is now; None: it was deleted, or cannot be read.
            seconds: Monotonic time, by which the age of a registration is judged.
        """
        before = self._seen.pop(key, {})
        if worker is None or not worker.status.gateways:
            return
        self._seen[key] = now = {}
        for entry in worker.status.gateways:
            name = RegistrationKey(key, entry.gateway, entry.lease_id)
            known, since = before.get(name, (None, seconds))
            now[name] = entry, since if known == entry else seconds

    def at(self, now: datetime, seconds: float) -> Expiries:
        """When they expire.

        Args:
            now: The time, in which the answer is given.
            seconds: Monotonic time of the same moment.
        """
        return _AtMoment(self._seen, now, seconds)


@dataclass(frozen=True, slots=True)
class _AtMoment:
    seen: Mapping[Key, Mapping[RegistrationKey, tuple[GatewayRegistration, float]]]
    now: datetime
    seconds: float

    def get(self, key: RegistrationKey, default: datetime, /) -> datetime:
        found = self.seen.get(key.worker, {}).get(key)
        return default if found is None else self.now + REGISTRATION_LIFE - timedelta(seconds=self.seconds - found[1])


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
