"""What the roles of one process share: settings, shutdown, metrics registry and the copy of the store."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from bkpool.appliance import logs
from bkpool.appliance.backend import Backend
from bkpool.appliance.ready_checks import ReadyChecks
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import Shutdown
from bkpool.appliance.supervise import background_task
from bkpool.appliance.tuning import wanted_shares
from bkpool.core.descriptors import ConnectionShares, share_descriptors
from bkpool.core.subscribers import Subscribers
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.store import Store
from bkpool.store.mirror import Mirror
from bkpool.telemetry.log_metrics import LogMetrics
from bkpool.telemetry.loop_metrics import LoopMetrics
from bkpool.telemetry.loop_watchdog import LoopWatchdog
from bkpool.telemetry.registry import new_registry
from bkpool.toolchain.descriptor_limit import current_limit

log = structlog.get_logger(__name__)


def utc_now() -> datetime:
    """The clock of a process."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class RoleContext:
    """What every role of a process gets."""

    options: RunOptions
    shutdown: Shutdown
    registry: CollectorRegistry
    """The one registry of the process: each role registers its metrics in it."""
    watchdog: LoopWatchdog
    """Watches the main loop; a role that starts further loops adds them."""
    shares: ConnectionShares
    """How many connections each server of the process may have."""
    checks: ReadyChecks = field(default_factory=ReadyChecks)
    """What `/ready` asks: each role adds its parts."""
    now: Callable[[], datetime] = utc_now

    async def run_in_background(self, stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine until the stack is closed. If it fails, the process ends with its error."""
        await stack.enter_async_context(background_task(work, self.shutdown.fail))


def open_context(stack: AsyncExitStack, options: RunOptions, shutdown: Shutdown) -> RoleContext:
    """Creates the context and watches the running event loop until the stack is closed."""
    registry = new_registry()
    LogMetrics(registry, logs.lines_lost)
    timeout = options.settings.metrics.loop_timeout.total_seconds()
    watchdog = LoopWatchdog(LoopMetrics(registry), timeout=timeout)
    watchdog.watch("main", asyncio.get_running_loop(), threading.get_ident())
    watchdog.start()
    stack.callback(watchdog.stop)
    return RoleContext(options, shutdown, registry, watchdog, _shares(options))


def _shares(options: RunOptions) -> ConnectionShares:
    """What the limit of open files leaves for connections. Logs it, with what the settings want."""
    wanted, limit = wanted_shares(options.settings), current_limit()
    shares = share_descriptors(limit, wanted)
    numbers = {"limit": limit, **asdict(shares)}
    if shares == wanted:
        log.info("appliance.descriptors", **numbers)
    else:
        more = {f"{name}_wanted": number for name, number in asdict(wanted).items()}
        hint = "raise the hard limit of open files: ulimit -Hn, or LimitNOFILE= of the unit"
        log.warning("appliance.descriptors", **numbers, **more, hint=hint)
    return shares


@dataclass(frozen=True, slots=True)
class ControlState:
    """What API and controller work on."""

    backend: Backend
    mirror: Mirror
    """The copy of the backend's store."""
    issuers: IssuerKeys
    """The keys of OIDC issuers."""
    waiting: Subscribers[[]] = field(default_factory=Subscribers)
    """Called when a request of this process begins to wait for a worker."""


async def follow(stack: AsyncExitStack, context: RoleContext, store: Store, mirror: Mirror) -> None:
    """Keeps the copy of the store up to date until the stack is closed; returns when it is complete."""
    stack.callback(context.checks.add("the store", store.answers))
    await context.run_in_background(stack, mirror.run())
    await mirror.ready.wait()


def replica_name() -> str:
    """The pod's name, which no other pod has at the same time; outside of a pod the host's name."""
    return os.environ.get("POD_NAME") or socket.gethostname()
