"""The real gateway in a separate process. Its leases exist from the start, and its registry accepts everything.

usage: python -m bench.gateway CONFIG.json     It listens until it is killed. The tokens are in the file.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.certificates import WORKER_UID
from bkpool.appliance.logs import configure_logging
from bkpool.appliance.shutdown import SWITCH_INTERVAL
from bkpool.core import tokens
from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway, new_loop
from bkpool.gateway.net.dial import Dialler, PlainDial, TlsDialler
from bkpool.gateway.session.lease_table import LeaseRoute, TableChange, WorkerLeases
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.pki.worker_tls import worker_context

_HOUR = 3600.0


def has_threads() -> bool:
    """Returns whether this gateway can use several event loops."""
    return "threads" in inspect.signature(Gateway).parameters


class AcceptingRegistry:
    """A registry without a store: it accepts every registration and finds no lease."""

    async def register(self, route: LeaseRoute, connections: int) -> None: ...

    async def renew(self, route: LeaseRoute, connections: int) -> None: ...

    async def beat(self, loop: object, leases: Mapping[str, int]) -> None: ...

    async def withdraw(self, route: LeaseRoute) -> None: ...

    async def report_worker(self, route: LeaseRoute, silent_for: float | None) -> None: ...

    async def find(self, token_sha256: str) -> None: ...


def _table(config: dict[str, Any]) -> TableChange:
    pool = Key("default", "bench")
    now = time.time()
    workers = {}
    for number, token in enumerate(config["tokens"]):
        worker = Key("default", f"bench-worker-{number}")
        route = LeaseRoute(
            token_sha256=tokens.digest(token),
            lease_id=f"allocation-{number}",
            worker=worker,
            worker_uid=WORKER_UID,
            pool=pool,
            endpoint=config["endpoint"],
            wait_reason="",
            expires_at=now + _HOUR,
            not_after=now + _HOUR,
            drain_timeout=_HOUR,
        )
        workers[worker] = WorkerLeases(route)
    return TableChange(workers, frozenset({pool}))


async def serve(config: dict[str, Any]) -> None:
    """Runs the gateway with this configuration until the process is killed."""
    pem = {path.name: path.read_bytes() for path in Path(config["pki"]).iterdir()}  # noqa: ASYNC240 - nothing is served yet
    dial: Dialler = PlainDial
    if config["endpoint"].startswith("tcp:"):
        context = worker_context(pem["dialler.crt"], pem["dialler.key"], pem["backend-ca.crt"])
        dial = TlsDialler(lambda _pool: [context])
    gateway = Gateway(
        AcceptingRegistry(),
        now=lambda: datetime.now(UTC),
        metrics=GatewayMetrics(),
        limits=replace(
            GatewayLimits(), connections_per_lease=config["connections"], connections=config["connections"]
        ),
        dial=dial,
        loop_factory=new_loop if config["loop"] == "uvloop" else asyncio.new_event_loop,
        **({"threads": config["threads"]} if has_threads() else {}),
    )
    gateway.set_server_certificate(pem["server.crt"], pem["server.key"], pem["ca.crt"])
    await gateway.start([("127.0.0.1", config["port"])])
    gateway.update(_table(config))
    await asyncio.Event().wait()


if __name__ == "__main__":
    configure_logging()  # a log line for each connection is a part of its cost
    sys.setswitchinterval(SWITCH_INTERVAL)
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
