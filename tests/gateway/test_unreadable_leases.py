"""Leases on a worker that cannot be read: open connections go on, new ones get the reason, until it can be read."""

from __future__ import annotations

from types import MappingProxyType

from bkpool.core import tokens
from bkpool.core.names import Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.gateway.session.lease_table import build_lease_table
from support.objects import lease, worker

HINT = "Correct that field, or delete the object. If a newer bkpool wrote it, use that version."
CANNOT_BE_READ = (9, f"BuildKitWorker default/p-worker-0 cannot be read: status.phase: must be 'Idle'. {HINT}")


def unreadable(token: str) -> Unreadable:
    document = worker(0, lease(token_sha256=tokens.digest(token))).to_json()
    return Unreadable(Worker, Key("default", "p-worker-0"), "status.phase: must be 'Idle'", document)


async def test_open_connections_go_on_and_new_ones_are_told_the_reason(world):
    token, other = world.lease("a"), world.lease("b", worker=Key("default", "p-worker-1"))
    streams = await world.connect(token)
    await streams.echo(b"building")

    routes = {digest: route for digest, route in world._routes.items() if digest == tokens.digest(other)}
    table = build_lease_table([], [], [Key("default", "p")], [unreadable(token)])
    world.gateway.update(type(table)(MappingProxyType(routes), table.past, table.pools, *unreadable_part(table)))
    await streams.echo(b"still building")
    assert await (await world.connect(token)).call() == CANNOT_BE_READ
    await (await world.connect(other)).echo(b"not concerned")
    await streams.echo(b"and still")
    assert "withdraw" not in [call[0] for call in world.registry.calls], (
        "its registration stays while it has a connection"
    )

    world._update()
    await (await world.connect(token)).echo(b"and it goes on")
    await streams.echo(b"the old one, too")


def unreadable_part(table):
    return table.unreadable, table.unreadable_workers


def test_the_table_has_the_tokens_that_can_be_read_and_every_pool():
    found = unreadable("t" * 43)
    broken = Unreadable(Worker, Key("default", "p-worker-1"), "spec: is missing", {"metadata": {}})
    table = build_lease_table([], [], [Key("default", "q")], [found, broken])
    assert table.pools == {Key("default", "q")}, "so that a name of its Service still needs a lease of it"
    assert table.unreadable_workers == {found.key, broken.key}
    assert table.unreadable[found.of_lease("tokenSHA256")].pool == Key("default", "p")
