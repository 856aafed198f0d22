"""What must hold of a gateway after an attack, whatever the attack was; to be wrapped around it.

It attacks nobody itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from structlog.testing import capture_logs


class Siege:
    """A world under attack.

    Args:
        world: As the fixture `new_world` makes it.
    """

    def __init__(self, world: Any) -> None:
        self.world = world
        self.dialled = 0
        """How many reached a worker that had a right to."""

    async def good_client(self) -> None:
        """Comes with a lease, is served, and leaves."""
        active = self.world.count("active_connections")
        streams = await self.enter("good")
        streams.writer.transport.abort()
        await self.world.until(lambda: self.world.count("active_connections") <= active)

    async def enter(self, name: str) -> Any:
        """A client with a lease that is served and stays."""
        self.dialled += 1
        streams = await self.world.connect(self.world.lease(name))
        await streams.echo(b"as if nothing were")
        return streams


@asynccontextmanager
async def besieged(new_world: Callable[..., Any], capfd: Any, **settings: Any) -> AsyncIterator[Siege]:
    """A world with room for two connections and a good client, which goes on afterwards while another comes in.

    So no slot is lost. Nobody without a right to it has reached a worker, nothing is in the log as a fault, and no
    token is in it. That no descriptor, thread or fault is left in the gateway's loop is what `new_world` holds.

    Args:
        new_world: The fixture.
        capfd: The fixture.
        settings: What else the world is made with.
    """
    siege = Siege(world := await new_world(**{"connections": 2} | settings))
    bystander = await siege.enter("bystander")
    with capture_logs() as logs:
        yield siege
        await bystander.echo(b"and after")
        await world.until(lambda: world.count("active_connections") == 1)
        await siege.enter("latecomer")
    assert world.count("active_connections") == 2
    assert world.dialled == siege.dialled
    assert not [entry for entry in logs if entry["log_level"] in {"error", "critical"} or "exc_info" in entry]
    assert not [entry for entry in logs if world.token("a") in str(entry)], "a token is in the log"
    assert capfd.readouterr().err == ""
