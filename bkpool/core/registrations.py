"""How long the registration of a gateway is valid, on the clock of the one who reads it (rule 10, docs/rules.md#r10).

The clocks of two machines may differ by more than a registration lives, so they are not compared. The reader counts
from the moment when it saw an entry for the first time, saw it change, or saw a new heartbeat of its gateway that
names the lease. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from bkpool.core.gateway_heartbeat import ABSENT, GatewayHeartbeat, HeartbeatVersion, connections_of
from bkpool.core.names import Key
from bkpool.core.worker import GatewayRegistration, Worker

REGISTRATION_LIFE = timedelta(seconds=60)
"""A registration that was not renewed for this long has expired."""
_LIFE = REGISTRATION_LIFE.total_seconds()


class RegistrationKey(NamedTuple):
    """Which registration: of this gateway, for this lease, on this worker."""

    worker: Key
    gateway: str
    lease_id: str


class Expiries(Protocol):
    """When each registration expires unless it is renewed."""

    def get(self, key: RegistrationKey, default: datetime, /) -> datetime:
        """When this one does; the default if it was not seen before, so that it is valid."""

    def connections(self, entry: GatewayRegistration, /) -> int:
        """How many connections its gateway has said last."""


class _NoneSeen:
    def get(self, _key: RegistrationKey, default: datetime, /) -> datetime:
        return default

    def connections(self, entry: GatewayRegistration, /) -> int:
        return entry.connections


NONE_SEEN: Expiries = _NoneSeen()


class SeenHeartbeats:
    """Remembers when each gateway has named each lease last."""

    def __init__(self) -> None:
        self._latest: dict[Key, GatewayHeartbeat] = {}
        self._named: dict[Key, dict[str, float]] = {}
        self._absent: dict[Key, float] = {}
        """When somebody saw that there is none, or none any more."""

    def look(
        self, key: Key, heartbeat: GatewayHeartbeat | None, seconds: float, needed: Collection[Key] = ()
    ) -> None:
        """Takes note of a heartbeat that may have changed.

        Args:
            key: Its name.
            heartbeat: As it is now; None: there is none. Its gateway may have written it shortly before that.
            seconds: Monotonic time.
            needed: The heartbeats of which it must not be forgotten that there is none.
        """
        before = self._latest.pop(key, None)
        if heartbeat is None:
            self._named.pop(key, None)
            self._absent = {old: at for old, at in self._absent.items() if seconds - at < _LIFE or old in needed}
            self._absent[key] = seconds
            return
        self._latest[key] = heartbeat
        if before is not None and (before.uid, before.status) == (heartbeat.uid, heartbeat.status):
            return  # something else of the object has changed
        kept = {lease: at for lease, at in self._named.get(key, {}).items() if seconds - at < _LIFE}
        self._named[key] = {**kept, **dict.fromkeys(heartbeat.status.leases, seconds)}

    def named_at(self, entry: GatewayRegistration, default: float) -> float:
        """When the gateway of a registration has named its lease last; the default if that was earlier, or never."""
        key = entry.heartbeat_key
        if key is None:
            return default
        named = self._named.get(key, {}).get(entry.lease_id, default)
        return max(named, self._absent.get(key, default), default)

    def named_lately(self, key: Key, seconds: float) -> set[str]:
        """The leases that a heartbeat has named so lately that no registration for them has expired by now."""
        return {lease for lease, at in self._named.get(key, {}).items() if seconds - at < _LIFE / 2}

    def latest(self, key: Key) -> GatewayHeartbeat | None:
        """The heartbeat as it was looked at last."""
        return self._latest.get(key)

    def version(self, key: Key) -> HeartbeatVersion | None:
        """The version by which registrations are judged; None: it was never seen, nor that there is none."""
        found = self._latest.get(key)
        if found is not None:
            return HeartbeatVersion.of(found)
        return ABSENT if key in self._absent else None

    def connections(self, entry: GatewayRegistration) -> int:
        """How many connections the gateway of a registration has said last."""
        key = entry.heartbeat_key
        return connections_of(entry, self._latest.get(key) if key else None)


class SeenRegistrations:
    """Remembers since when each registration has been as it is, and when a heartbeat has renewed it."""

    def __init__(self) -> None:
        self._seen: dict[Key, dict[RegistrationKey, tuple[GatewayRegistration, float]]] = {}
        self._renewed_by: dict[Key, dict[RegistrationKey, GatewayRegistration]] = {}  # by the name of the heartbeat
        self._heartbeats = SeenHeartbeats()

    def look(self, key: Key, worker: Worker | None, seconds: float) -> None:
        """Takes note of the registrations on a worker that has changed, and forgets those that are gone.

        Args:
            key: The worker's name.
            worker: The worker as it is now; None: it was deleted, or cannot be read.
            seconds: Monotonic time, by which the age of a registration is judged.
        """
        before = self._seen.pop(key, {})
        for name, (entry, _) in before.items():
            self._set_renewed_by(entry.heartbeat_key, name, None)
        if worker is None or not worker.status.gateways:
            return
        self._seen[key] = now = {}
        for entry in worker.status.gateways:
            name = RegistrationKey(key, entry.gateway, entry.lease_id)
            known, since = before.get(name, (None, seconds))
            now[name] = entry, since if known == entry else seconds
            self._set_renewed_by(entry.heartbeat_key, name, entry)

    def look_at_heartbeat(self, key: Key, heartbeat: GatewayHeartbeat | None, seconds: float) -> set[Key]:
        """Takes note of a gateway's heartbeat that may have changed, or was deleted.

        Returns:
            The workers that have another number of connections than before: the gateway says another one, or a
            registration is renewed that had expired, so that its connections did not count.
        """
        before, entries = self._heartbeats.latest(key), self._renewed_by.get(key, {})
        live = self._heartbeats.named_lately(key, seconds)  # mostly all of many, and that is known quickly
        expired = {name for name in entries if name.lease_id not in live and self._has_expired(name, seconds)}
        self._heartbeats.look(key, heartbeat, seconds, self._renewed_by)
        return {
            name.worker
            for name, entry in entries.items()
            if connections_of(entry, heartbeat) != connections_of(entry, before)
            or (name in expired and not self._has_expired(name, seconds))
        }

    def heartbeats_of(self, worker: Worker, lease_id: str) -> Mapping[Key, HeartbeatVersion | None]:
        """The heartbeats by which the registrations of a lease are judged at the moment."""
        keys = (one.heartbeat_key for one in worker.status.gateways if one.lease_id == lease_id)
        return {key: self._heartbeats.version(key) for key in keys if key is not None}

    def at(self, now: datetime, seconds: float) -> Expiries:
        """When they expire.

        Args:
            now: The time, in which the answer is given.
            seconds: Monotonic time of the same moment.
        """
        return _AtMoment(self, now, seconds)

    def renewed_at(self, key: RegistrationKey) -> float | None:
        """When this registration was seen to be renewed last; None: it was not seen."""
        found = self._seen.get(key.worker, {}).get(key)
        return None if found is None else self._heartbeats.named_at(*found)

    def connections(self, entry: GatewayRegistration) -> int:
        """How many connections the gateway of a registration has said last."""
        return self._heartbeats.connections(entry)

    def _has_expired(self, key: RegistrationKey, seconds: float) -> bool:
        renewed_at = self.renewed_at(key)
        return renewed_at is not None and _life_left(renewed_at, seconds) <= timedelta(0)

    def _set_renewed_by(self, key: Key | None, name: RegistrationKey, entry: GatewayRegistration | None) -> None:
        if key is None:
            return
        if entry is not None:
            self._renewed_by.setdefault(key, {})[name] = entry
        elif key in self._renewed_by:
            self._renewed_by[key].pop(name, None)
            if not self._renewed_by[key]:
                del self._renewed_by[key]


@dataclass(frozen=True, slots=True)
class _AtMoment:
    seen: SeenRegistrations
    now: datetime
    seconds: float

    def get(self, key: RegistrationKey, default: datetime, /) -> datetime:
        renewed_at = self.seen.renewed_at(key)
        if renewed_at is None:
            return default
        return self.now + _life_left(renewed_at, self.seconds)

    def connections(self, entry: GatewayRegistration, /) -> int:
        return self.seen.connections(entry)


def _life_left(renewed_at: float, seconds: float) -> timedelta:
    """For how long a registration is valid that was renewed at this time; 0 or less: it has expired."""
    return REGISTRATION_LIFE - timedelta(seconds=seconds - renewed_at)


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
