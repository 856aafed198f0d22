"""What must hold for a gateway after an attack, whatever the attack was.

The module itself attacks nothing: a test attacks inside `attacked_gateway`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from support.captured_logs import capture_logs
from support.gateway_client import GatewayClient
from support.gateway_world import GatewayWorld, NewWorld


class AttackedGateway:
    """A gateway under attack.

    Args:
        world: The gateway and its leases.
    """

    def __init__(self, world: GatewayWorld) -> None:
        self.world = world
        self.allowed_connections = 0
        """Connections that were allowed to reach a worker."""

    async def serve_good_client(self) -> None:
        """Connects a client with a lease, checks that it is served, and disconnects it."""
        active = self.world.metric("active_connections")
        client = await self.connect_good_client("good")
        client.writer.transport.abort()
        await self.world.wait_until(lambda: self.world.metric("active_connections") <= active)

    async def connect_good_client(self, name: str) -> GatewayClient:
        """Connects a client with a lease, and checks that it is served."""
        self.allowed_connections += 1
        client = await self.world.connect(self.world.lease(name))
        await client.echo(b"as if nothing had happened")
        return client


@asynccontextmanager
async def attacked_gateway(
    new_world: NewWorld, capfd: pytest.CaptureFixture[str], **settings: Any
) -> AsyncIterator[AttackedGateway]:
    """Makes a gateway with slots for two connections, and one good client that is served before and after the attack.

    After the attack a second good client must be served, so no slot is lost. No connection without a right to a
    worker has reached one. The log has no error and no token. `new_world` checks that no file descriptor, thread or
    loop error is left.

    Args:
        new_world: The fixture.
        capfd: The fixture.
        settings: Other arguments of `GatewayWorld.start`.
    """
    world = await new_world(**{"connections": 2} | settings)
    attacked = AttackedGateway(world)
    earlier_client = await attacked.connect_good_client("earlier")
    with capture_logs() as logs:
        yield attacked
        await earlier_client.echo(b"after the attack")
        await world.wait_until(lambda: world.metric("active_connections") == 1)
        await attacked.connect_good_client("later")
    assert world.metric("active_connections") == 2
    assert world.worker_connections == attacked.allowed_connections
    assert not [entry for entry in logs if entry["log_level"] in {"error", "critical"} or "exc_info" in entry]
    assert not [entry for entry in logs if world.token("a") in str(entry)], "a token is in the log"
    assert capfd.readouterr().err == ""
