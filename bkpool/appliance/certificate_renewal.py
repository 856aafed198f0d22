"""Renews the server certificate of a gateway that runs on the machine of its CA.

It decides when a certificate is due: shortly before the old one expires, and when the set of pools changes. `pki`
issues the certificate, and the gateway replaces it without closing connections.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from bkpool.core.errors import DiskFull
from bkpool.core.names import Key
from bkpool.core.wall_clock import pause_until
from bkpool.gateway.control.server import Gateway
from bkpool.pki import storage
from bkpool.pki.authority import SERVER_LIFE, Authority
from bkpool.pki.names import gateway_names
from bkpool.pki.rotation import Former, Rotation
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

RETRY_INTERVAL = 5.0
"""Seconds until a certificate that could not be stored is issued again."""


class CertificateRenewal:
    """Keeps the gateway's server certificate valid, with the names of all pools in it.

    Args:
        directory: Where the certificate is stored.
        authority: Signs it.
        former: What the last rotation of the CA has replaced. It signs as long as an earlier lease needs it.
        mirror: Knows the pools, whose Services are among the names.
        hosts: Further names of the gateway.
        hosts_from: What gave them, for error messages.
        now: The clock.
        recorder: Records a changed certificate at each pool.
        life: How long a certificate is valid.
        pause: Waits that many seconds.
    """

    def __init__(
        self,
        *,
        directory: Path,
        authority: Authority,
        mirror: Mirror,
        hosts: tuple[str, ...],
        hosts_from: str,
        now: Callable[[], datetime],
        recorder: Recorder,
        life: timedelta = SERVER_LIFE,
        former: Former | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._pause = pause
        self._directory = directory
        self._rotation = Rotation(authority, former, now)
        self._trusted = b""
        self._mirror = mirror
        self._hosts = hosts
        self._hosts_from = hosts_from
        self._now = now
        self._recorder = recorder
        self._life = life
        self._served: bytes | None = None
        self._named_pools: tuple[Key, ...] | None = None
        self._due = self._now()

    def install(self, gateway: Gateway) -> None:
        """Hands the gateway its certificate, newly issued if that is due. Open connections continue."""
        self._named_pools = tuple(sorted(self._mirror.pools))
        names = gateway_names(socket.gethostname(), self._named_pools, self._hosts, self._hosts_from)
        workers = self._mirror.all_workers()
        signer, self._trusted = self._rotation.signer(workers), self._rotation.trusted_by_gateways(workers)
        stored = storage.server_certificate(self._directory, signer, names, self._now(), self._life)
        self._due = stored.renew_at
        certificate = stored.cert_file.read_bytes()
        gateway.set_server_certificate(certificate, stored.key_file.read_bytes(), self._trusted)
        if self._served not in {None, certificate}:
            for pool in self._mirror.pools.values():
                self._recorder.record(pool, "CertificateRotated", "the gateway's certificate was issued again")
        self._served = certificate

    async def run(self, gateway: Gateway) -> None:
        """Renews the certificate whenever it is due, until cancelled."""
        changed = asyncio.Event()
        unsubscribe = self._mirror.subscribe(lambda _pool: changed.set())
        try:
            while True:
                with suppress(TimeoutError):
                    check_at = min(self._due, self._rotation.next_check or self._due)
                    async with asyncio.timeout(pause_until(check_at, self._now())):
                        await changed.wait()
                changed.clear()
                if self._is_due():
                    await self._install_when_possible(gateway)
        finally:
            unsubscribe()

    async def _install_when_possible(self, gateway: Gateway) -> None:
        """Tries again while the disk is full. The former certificate is served meanwhile."""
        while True:
            try:
                self.install(gateway)
            except DiskFull as fault:
                log.warning("gateway.certificate_not_stored", reason=fault.message)
                await self._pause(RETRY_INTERVAL)
            else:
                return

    def _is_due(self) -> bool:
        """Whether the certificate ends soon, or the pools or the CAs that are trusted have changed."""
        return (
            self._now() >= self._due
            or tuple(sorted(self._mirror.pools)) != self._named_pools
            or self._rotation.trusted_by_gateways(self._mirror.all_workers()) != self._trusted
        )
