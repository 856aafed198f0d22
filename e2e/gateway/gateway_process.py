"""A gateway in a separate process, so that a test can watch its descriptors and memory and set its limits.

usage: python e2e/gateway/gateway_process.py
It reads one line of JSON from standard input: settings, tokens and keys. It prints its port, and for each further
line its counters. When its input ends, it closes the gateway and ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import structlog

from bkpool.core import tokens
from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway, default_threads
from bkpool.gateway.session.lease_table import LeaseRoute, TableChange, WorkerLeases
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.metrics import GatewayMetrics
from support.accepting_registry import AcceptingRegistry

HOUR = 3600.0
POOL = Key("default", "p")


def table(leases: dict[str, str | None]) -> TableChange:
    """Makes a table of tokens and the endpoints of their workers; None for a worker that is not ready."""
    now = time.time()
    workers = {}
    for number, (token, endpoint) in enumerate(leases.items()):
        worker = Key("default", f"p-worker-{number}")
        route = LeaseRoute(
            token_sha256=tokens.digest(token),
            lease_id=f"allocation-{number}",
            worker=worker,
            worker_uid=f"uid-{number}",
            pool=POOL,
            endpoint=endpoint,
            wait_reason="" if endpoint else "it is being started",
            expires_at=now + HOUR,
            not_after=now + HOUR,
            drain_timeout=HOUR,
        )
        workers[worker] = WorkerLeases(route)
    return TableChange(workers, frozenset({POOL}))


def counters(metrics: GatewayMetrics) -> dict[str, float]:
    value = metrics.registry.get_sample_value
    refused = {"pool": "", "pool_namespace": "", "reason": "TlsFailed"}
    pool = {"pool": POOL.name, "pool_namespace": POOL.namespace}
    return {
        "active": value("buildkit_gateway_active_connections", pool) or 0,
        "tls_failed": value("buildkit_gateway_refusals_total", refused) or 0,
    }


async def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    settings: dict[str, Any] = json.loads(await asyncio.to_thread(sys.stdin.readline))
    metrics = GatewayMetrics()
    gateway = Gateway(
        AcceptingRegistry(),
        now=lambda: datetime.now(UTC),
        metrics=metrics,
        limits=replace(GatewayLimits(), **settings["limits"]),
        threads=default_threads(),
    )
    gateway.set_server_certificate(*(settings[part].encode() for part in ("cert", "key", "ca")))
    [(_, port)] = await gateway.start([("127.0.0.1", 0)])
    gateway.update(table(settings["leases"]))
    print(port, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(counters(metrics)), flush=True)
    await gateway.close()


if __name__ == "__main__":
    asyncio.run(main())
