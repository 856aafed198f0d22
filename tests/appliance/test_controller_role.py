"""The controller role in a process that loses the Lease and gets it again: nothing of the first time is left."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bkpool.appliance.backend import Backend
from bkpool.appliance.roles.context import ControlState, open_context
from bkpool.appliance.roles.controller import open_controller
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import Shutdown
from bkpool.controller import Controller
from bkpool.controller.pool_gateways import PoolGateways
from bkpool.store.mirror import Mirror
from support.no_store import NoStore
from support.world import MemoryWorkers

TIMES = 2
SUBSCRIPTIONS = [3, 4, 2, 1]
"""While the controller runs: for daemons, caches and their CAs, for pools, for issuers, for the gateways of pools."""


class Lease:
    """Is got, lost and got again. It is lost as soon as everything that the work starts has subscribed."""

    def __init__(self, subscriptions: Callable[[], list[int]]) -> None:
        self._subscriptions = subscriptions
        self.over = asyncio.Event()

    async def lead(self, work: Any) -> None:
        for _ in range(TIMES):
            await self._run_while_held(work)
        self.over.set()
        await asyncio.Event().wait()

    async def _run_while_held(self, work: Any) -> None:
        run = asyncio.create_task(work())
        while self._subscriptions() != SUBSCRIPTIONS and not run.done():  # noqa: ASYNC110 - they set no event
            await asyncio.sleep(0)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        assert run.cancelled(), run.exception()

    async def release(self) -> None:
        pass


@pytest.fixture
def controllers(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Controller]]:
    """Every controller that is made, without keeping it."""
    made: list[weakref.ref[Controller]] = []
    make = Controller.__init__

    def note(self: Controller, **arguments: Any) -> None:
        made.append(weakref.ref(self))
        make(self, **arguments)

    monkeypatch.setattr(Controller, "__init__", note)
    return made


async def test_a_controller_is_forgotten_when_the_lease_is_lost(
    tmp_path: Path, controllers: list[weakref.ref[Controller]]
) -> None:
    nothing: Any = NoStore()  # there is no pool and no issuer, so these are not used
    mirror, workers, made = Mirror(nothing), MemoryWorkers(), []
    mirror.ready.set()

    def subscriptions() -> list[int]:
        others = (workers.subscribers, mirror._subscribers, mirror._config_subscribers)
        return [*map(len, others), sum(len(gateways._subscribers) for gateways in made)]

    lease = Lease(subscriptions)
    runtime: Any = SimpleNamespace(daemons=workers, caches=workers)
    leadership: Any = lease
    backend = Backend(
        store=nothing,
        runtime=runtime,
        authority=nothing,
        token_key=b"",
        dial=nothing,
        gateway="",
        recorder=nothing,
        authenticators=nothing,
        leadership=leadership,
    )

    def make_pool_gateways() -> PoolGateways:
        made.append(
            PoolGateways(
                nothing,
                mirror,
                nothing,
                workers,
                image="",
                controller="",
                namespace="",
                now=nothing,
                recorder=nothing,
            )
        )
        return made[-1]

    issuers: Any = SimpleNamespace(probe=None)
    async with AsyncExitStack() as stack:
        context = open_context(stack, RunOptions(home=tmp_path, cache=tmp_path), Shutdown())
        await open_controller(
            stack,
            context,
            ControlState(backend, mirror, issuers),
            endpoint=lambda _pool: "",
            make_pool_gateways=make_pool_gateways,
        )
        async with asyncio.timeout(60):
            await lease.over.wait()
        assert subscriptions() == [0, 0, 0, 0]
        gc.collect()
        assert [controller() for controller in controllers] == [None] * TIMES
