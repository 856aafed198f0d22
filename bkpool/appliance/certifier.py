"""The gateway's server certificate: issued, renewed before it ends, and right for the pools that there are.

It only says when; issuing is pki's, and the swap without losing a connection is the gateway's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway
from bkpool.pki import storage
from bkpool.pki.authority import Authority
from bkpool.pki.names import gateway_names
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror


class Certifier:
    """Keeps the gateway's server certificate valid, and right for the pools that there are.

    Args:
        gateway: Gets each new certificate.
        directory: Where it is kept.
        authority: Signs it.
        mirror: Knows the pools, whose Services are among the names.
        hosts: Further names of the gateway.
        now: The clock.
        recorder: Is told of a changed certificate, about each pool.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        directory: Path,
        authority: Authority,
        mirror: Mirror,
        hosts: tuple[str, ...],
        now: Callable[[], datetime],
        recorder: Recorder,
    ) -> None:
        self._gateway = gateway
        self._directory = directory
        self._authority = authority
        self._mirror = mirror
        self._hosts = hosts
        self._now = now
        self._recorder = recorder
        self._served: bytes | None = None
        self._certified: tuple[Key, ...] | None = None
        self._due = self._now()

    def renew(self) -> None:
        """Issues the certificate if that is due, and hands it to the gateway: open connections go on."""
        self._certified = tuple(sorted(self._mirror.pools))
        names = gateway_names(socket.gethostname(), self._certified, self._hosts)
        kept = storage.server_certificate(self._directory, self._authority, names, self._now())
        self._due = kept.renew_at
        certificate = kept.cert_file.read_bytes()
        self._gateway.set_server_certificate(certificate, kept.key_file.read_bytes(), self._authority.cert_pem)
        if self._served not in {None, certificate}:
            for pool in self._mirror.pools.values():
                self._recorder.record(pool, "CertificateRotated", "the gateway's certificate is issued anew")
        self._served = certificate

    async def run(self) -> None:
        """Until cancelled."""
        changed = asyncio.Event()
        unsubscribe = self._mirror.subscribe(lambda _pool: changed.set())
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, (self._due - self._now()).total_seconds())):
                        await changed.wait()
                changed.clear()
                if tuple(sorted(self._mirror.pools)) != self._certified or self._now() >= self._due:
                    self.renew()
        finally:
            unsubscribe()
