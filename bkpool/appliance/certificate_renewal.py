"""Renews the server certificate of a gateway that runs on the machine of its CA.

It decides when a certificate is due: shortly before the old one expires, and when the set of pools changes. `pki`
issues the certificate, and the gateway replaces it without closing connections.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway
from bkpool.pki import storage
from bkpool.pki.authority import SERVER_LIFE, Authority
from bkpool.pki.names import gateway_names
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror


class CertificateRenewal:
    """Keeps the gateway's server certificate valid, with the names of all pools in it.

    Args:
        directory: Where the certificate is stored.
        authority: Signs it.
        mirror: Knows the pools, whose Services are among the names.
        hosts: Further names of the gateway.
        hosts_from: What gave them, for error messages.
        now: The clock.
        recorder: Records a changed certificate at each pool.
        life: How long a certificate is valid.
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
    ) -> None:
        self._directory = directory
        self._authority = authority
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
        stored = storage.server_certificate(self._directory, self._authority, names, self._now(), self._life)
        self._due = stored.renew_at
        certificate = stored.cert_file.read_bytes()
        gateway.set_server_certificate(certificate, stored.key_file.read_bytes(), self._authority.cert_pem)
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
                    async with asyncio.timeout(max(0.0, (self._due - self._now()).total_seconds())):
                        await changed.wait()
                changed.clear()
                if tuple(sorted(self._mirror.pools)) != self._named_pools or self._now() >= self._due:
                    self.install(gateway)
        finally:
            unsubscribe()
