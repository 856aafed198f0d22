"""Leases on a worker that cannot be read: open connections go on, new ones get the reason, until it can be read."""

from __future__ import annotations

import pytest

from bkpool.core import tokens
from bkpool.core.names import Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.gateway.session.lease_table import LeaseTable, TableChange, WorkerLeases, unreadable_leases
from support.objects import lease, worker

WORKER = Key("default", "p-worker-0")
HINT = "Correct that field, or delete the object. If a newer bkpool wrote it, use that version."
CANNOT_BE_READ = (9, f"BuildKitWorker default/p-worker-0 cannot be read: status.phase: must be 'Idle'. {HINT}")


def unreadable(token: str) -> Unreadable:
    document = worker(0, lease(token_sha256=tokens.digest(token))).to_json()
    return Unreadable(Worker, WORKER, "status.phase: must be 'Idle'", document)


async def test_open_connections_go_on_and_new_ones_are_told_the_reason(world):
    token, other = world.lease("a"), world.lease("b")
    streams = await world.connect(token)
    await streams.echo(b"building")

    world.send_worker(WORKER, unreadable_leases(unreadable(token)))
    await streams.echo(b"still building")
    assert await (await world.connect(token)).call() == CANNOT_BE_READ
    await (await world.connect(other)).echo(b"not concerned")
    await streams.echo(b"and still")
    assert "withdraw" not in [call[0] for call in world.registry.calls], (
        "its registration stays while it has a connection"
    )

    world.lease("a")
    await (await world.connect(token)).echo(b"and it goes on")
    await streams.echo(b"the old one, too")


@pytest.mark.parametrize("document", [{}, None], ids=["no token can be read", "the token can be read"])
async def test_a_lease_that_is_gone_when_its_worker_can_be_read_again_ends(world, document):
    token = world.lease("a", drain_timeout=0.0)
    streams = await world.connect(token)
    await streams.echo(b"building")
    found = unreadable(token)
    if document is not None:
        found = Unreadable(Worker, WORKER, found.reason, document)
    for _ in range(2):  # it is changed and still cannot be read
        world.send_worker(WORKER, unreadable_leases(found))
    await streams.echo(b"still building")
    world.send_worker(WORKER, WorkerLeases())
    assert await streams.read_to_end() == b""
    assert (await (await world.connect(token)).call())[0] == 16


def test_the_table_has_the_tokens_that_can_be_read():
    found = unreadable("t" * 43)
    broken = Unreadable(Worker, Key("default", "p-worker-1"), "spec: is missing", {"metadata": {}})
    table = LeaseTable()
    table.apply(TableChange({one.key: unreadable_leases(one) for one in (found, broken)}, frozenset()))
    assert not table.can_be_read(found.key)
    assert not table.can_be_read(broken.key)
    assert table.unreadable(found.of_lease("tokenSHA256")).pool == Key("default", "p")
