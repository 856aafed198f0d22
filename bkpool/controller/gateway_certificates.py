"""Issues the certificates of a pool's gateway: one that it shows its clients, and those that it shows workers.

A certificate that can be used further stays as it is. It reads and writes no Secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from bkpool.core.names import Key, Slot
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import diallers_fit, gateway_diallers, gateway_server, server_fits
from bkpool.pki.names import CertificateNames
from bkpool.pki.rotation import Rotation


class WorkerAuthorities(Protocol):
    """What is known of the CAs of each pool's workers."""

    def current_authority(self, pool: Key) -> Authority:
        """The CA that signs for the pool's workers now."""

    def former_authority(self, pool: Key) -> Authority | None:
        """The CA of those workers that were made with another one; None if there are none."""

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back when workers have changed; returns what unsubscribes."""


@dataclass(frozen=True, slots=True)
class GatewayCertificates:
    """Issues the certificates of gateways.

    Attributes:
        rotation: Signs what gateways show their clients.
        all_workers: Returns all workers, with their leases.
        workers: Sign what gateways show workers.
        life: How long a certificate for clients is valid.
    """

    rotation: Rotation
    all_workers: Callable[[], Iterable[Worker | Unreadable]]
    workers: WorkerAuthorities
    life: timedelta

    def server_fits(self, found: Mapping[str, bytes], names: CertificateNames | None, now: datetime) -> bool:
        """Whether the certificate for clients can be used further, for these names (None: for any)."""
        workers = tuple(self.all_workers())
        signer, trusted = self.rotation.signer(workers), self.rotation.trusted_by_gateways(workers)
        return server_fits(found, signer, names, now, trusted=trusted)

    def server(self, names: CertificateNames, now: datetime) -> dict[str, bytes]:
        """A new certificate for clients."""
        workers = tuple(self.all_workers())
        signer, trusted = self.rotation.signer(workers), self.rotation.trusted_by_gateways(workers)
        return gateway_server(signer, names, now, self.life, trusted=trusted)

    def overlaps(self) -> bool:
        """Whether the CA that a rotation has replaced is still needed."""
        return self.rotation.overlaps(self.all_workers())

    def with_diallers(
        self, found: Mapping[str, bytes], server: Mapping[str, bytes], pool: Key, gateway: str, now: datetime
    ) -> dict[str, bytes]:
        """The certificate for clients together with those for workers.

        Args:
            found: The present certificates.
            server: The one for clients. If it is not the present one, the others are new, too.
            pool: The gateway's pool.
            gateway: The gateway's name.
            now: The time.
        """
        current, former = self.workers.current_authority(pool), self.workers.former_authority(pool)
        kept = all(found.get(name) == value for name, value in server.items())
        if kept and diallers_fit(found, current, former, now):
            return dict(found)
        return {**server, **gateway_diallers(current, former, gateway, now)}
