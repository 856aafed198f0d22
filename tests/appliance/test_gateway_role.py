"""The gateway role of a process: when it counts as open."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from bkpool.appliance.roles.context import open_context
from bkpool.appliance.roles.gateway import open_gateway
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import Shutdown
from bkpool.gateway.control.server import Gateway
from bkpool.gateway.net.dial import PlainDial
from bkpool.store.mirror import Mirror
from support.certificates import CertificateFactory
from support.no_store import NoStore
from support.objects import lease, worker


class Certificate:
    """A server certificate that is never renewed."""

    def __init__(self, directory: Path) -> None:
        self._ca = CertificateFactory(directory)

    def install(self, gateway):
        server = self._ca.server()
        gateway.set_server_certificate(server.cert, server.key, self._ca.pem)

    async def run(self, _gateway):
        await asyncio.Event().wait()


async def test_a_gateway_is_open_when_its_table_is_complete(tmp_path, monkeypatch):
    mirror, given = Mirror(NoStore()), set()
    for number in range(200):
        found = worker(number, lease(id=f"lease-{number}", token_sha256=f"token-{number}"))
        mirror.apply(found.but(metadata=found.metadata.but(resource_version=str(10 + number))))
    update = Gateway.update

    def noted(gateway, change):
        given.update(change.workers)
        update(gateway, change)

    monkeypatch.setattr(Gateway, "update", noted)
    async with AsyncExitStack() as stack:
        context = open_context(stack, RunOptions(home=tmp_path, cache=tmp_path), Shutdown())
        role = await open_gateway(
            stack,
            context,
            NoStore(),
            mirror,
            name="gateway-1",
            certificate=Certificate(tmp_path),
            dial=PlainDial,
            address=("127.0.0.1", 0),
            threads=1,
        )
        assert given == mirror.workers.keys()
        assert role.port
