"""Opens the controller role: the loop that keeps workers, and beside it those that keep issuers and pool gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial

from bkpool.appliance.roles.context import ControlState, RoleContext
from bkpool.appliance.supervise import run_while_leading
from bkpool.appliance.tuning import failure_limits
from bkpool.controller.dead_gateways import DeadGateways
from bkpool.controller.metrics import ControllerMetrics
from bkpool.controller.oidc_configs import OIDCConfigController
from bkpool.controller.pool_gateways import PoolGateways
from bkpool.controller.unreadable_objects import UnreadableObjects
from bkpool.controller.worker_labels import WorkerLabels
from bkpool.core.allowances import messages
from bkpool.core.ignored import IgnoredFields
from bkpool.core.pool import Pool
from bkpool.core.reconcile.pool_status import PoolStatusInputs


async def open_controller(
    stack: AsyncExitStack,
    context: RoleContext,
    state: ControlState,
    *,
    endpoint: Callable[[Pool], str],
    make_pool_gateways: Callable[[], PoolGateways] | None = None,
) -> None:
    """Runs the controller until the stack is closed.

    Where other processes can run a controller too, it runs only while this one holds the Lease. Closing the stack
    gives the Lease back.

    Args:
        stack: Ends it.
        context: Of this process.
        state: Where pools and workers are, and what runs workers.
        endpoint: Where callers reach a pool's gateway, unless PoolGateways knows it better.
        make_pool_gateways: Makes what keeps a gateway in the cluster for each pool; called each time this process
            gets the Lease. None if this process has the gateway itself.
    """
    metrics = ControllerMetrics(context.registry)
    work = partial(_run, context, state, metrics, endpoint, make_pool_gateways)
    leadership = state.backend.leadership
    if leadership is None:
        await context.run_in_background(stack, work())
    else:
        await context.run_in_background(stack, run_while_leading(leadership, work))


async def _run(
    context: RoleContext,
    state: ControlState,
    metrics: ControllerMetrics,
    endpoint: Callable[[Pool], str],
    make_pool_gateways: Callable[[], PoolGateways] | None,
) -> None:
    backend, mirror = state.backend, state.mirror
    daemons = backend.runtime.daemons
    ignored = IgnoredFields(daemons.ignored_spec_fields, daemons.ignored_config)
    gateways = make_pool_gateways() if make_pool_gateways else None

    def status_inputs(pool: Pool) -> PoolStatusInputs:
        host_not_allowed, not_allowed = messages(pool, backend.allowed, own_gateway=gateways is not None)
        return PoolStatusInputs(
            endpoint=(gateways.endpoints.get(pool.key) if gateways else None) or endpoint(pool),
            ignored=ignored.of(pool),
            capacity=backend.runtime.daemons.capacity,
            gateway_problem=gateways.trouble.get(pool.key, "") if gateways else "",
            host_not_allowed=host_not_allowed,
            not_allowed=not_allowed,
        )

    limits = failure_limits(context.options.settings)
    controller = backend.controller(mirror, status_inputs, metrics, context.now, limits)
    with ExitStack() as subscriptions:
        subscriptions.callback(context.checks.add("the controller", controller.answers))
        subscriptions.callback(state.waiting.add(controller.check_clock))
        if gateways is not None:
            subscriptions.callback(gateways.on_change(controller.look_again))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(controller.run())
            tasks.create_task(OIDCConfigController(backend.store, mirror, state.issuers.probe, context.now).run())
            tasks.create_task(UnreadableObjects(backend.store, mirror, backend.recorder, context.now).run())
            tasks.create_task(DeadGateways(backend.store, mirror.heartbeats).run())
            if gateways is not None:
                labels = WorkerLabels(backend.store, mirror)
                tasks.create_task(labels.run())
                # A gateway follows workers by their label, so none is begun before all have it.
                await labels.complete.wait()
                tasks.create_task(gateways.run())
