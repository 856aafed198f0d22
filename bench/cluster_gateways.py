"""The gateways of all pools of bench/cluster.py in one process: what they ask of the API server, without bytes.

Each is a real gateway replica with its own connection to the API server, copy of the store, threads and registry. A
connection of a lease is a line on a socket here, without TLS, dial and relay. The end of standard input ends it.

usage: python -m bench.cluster_gateways KUBECONFIG NAMESPACE POOL…
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from contextlib import AsyncExitStack
from contextvars import ContextVar
from pathlib import Path
from unittest.mock import patch

from bkpool.appliance import gateway_replica
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.logs import configure_logging
from bkpool.appliance.roles.gateway import GatewayRole, open_gateway
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import SWITCH_INTERVAL, Shutdown
from bkpool.core.errors import BkpoolError
from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway, new_loop
from bkpool.gateway.net.relay import WorkerBytes
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.shard_leases import ShardLease
from bkpool.settings import Address, Settings
from bkpool.toolchain.descriptor_limit import raise_limit

_POOL: ContextVar[str] = ContextVar("pool")
_STARTED_AT_ONCE = 4


class _Connection:
    """A connection of a lease, as its lease sees it: it is registered, and nothing comes from its worker."""

    worker_bytes: WorkerBytes | None = None

    def __init__(self, gateway: Gateway, token_sha256: str) -> None:
        [thread] = gateway._threads  # noqa: SLF001 - there is no other way in without a client certificate
        self._thread, self._leases = thread, thread.shard.leases
        self._token_sha256 = token_sha256
        self._lease: ShardLease | None = None
        self._main = asyncio.get_running_loop()

    async def open(self) -> str:
        """Registers for the lease. Returns why that was not possible; empty: it is open."""
        done: asyncio.Future[str] = self._main.create_future()

        def answered(error: BkpoolError | None) -> None:
            self._main.call_soon_threadsafe(done.set_result, error.message if error else "")

        def take() -> None:
            try:
                self._lease = self._leases.take_slot(self._token_sha256, self)
            except BkpoolError:  # the gateway does not know the lease yet: it searches the store
                self._leases.registry.find(self._token_sha256, found)
            else:
                self._lease.registration.ensure(answered)

        def found(_: BkpoolError | None) -> None:
            try:
                self._lease = self._leases.take_slot(self._token_sha256, self)
            except BkpoolError as error:
                answered(error)
            else:
                self._lease.registration.ensure(answered)

        self._thread.call(take)
        return await done

    def close(self) -> None:
        """The client has ended the connection."""
        if self._lease is not None:
            self._thread.call(self._leases.return_slot, self._lease, self)

    def route_changed(self, route: LeaseRoute) -> None: ...

    def worker_closed_sibling(self) -> None: ...

    def lease_ended(self, error: BkpoolError, cut_in: float) -> None: ...

    def lease_resumed(self) -> None: ...

    def cut(self, reason: str) -> None: ...


async def _serve(gateways: dict[str, Gateway], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serves lines of `open POOL DIGEST` and `close POOL DIGEST`; each is answered with a line."""
    connections: dict[str, _Connection] = {}
    while line := (await reader.readline()).decode().split():
        what, pool, token_sha256 = line
        trouble = ""
        if what == "open":
            connections[token_sha256] = _Connection(gateways[pool], token_sha256)
            trouble = await connections[token_sha256].open()
        else:
            connections.pop(token_sha256).close()
        writer.write(f"{trouble or 'ok'}\n".encode())


async def run(kubeconfig: Path, namespace: str, pools: list[str]) -> None:
    """Runs the gateways until standard input ends."""
    gateways: dict[str, Gateway] = {}

    async def noted(*args: object, **options: object) -> GatewayRole:
        role = await open_gateway(*args, **options)  # type: ignore[arg-type]
        gateways[_POOL.get()] = role.gateway
        return role

    shutdown, limit = Shutdown(), asyncio.Semaphore(_STARTED_AT_ONCE)
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bkpool-bench-")))
        configure_logging(home, Settings().appliance.log_size)
        stack.enter_context(patch.object(gateway_replica, "open_gateway", noted))
        stack.enter_context(patch.object(gateway_replica, "default_threads", lambda: 1))
        stack.enter_context(patch.object(gateway_replica, "replica_name", lambda: f"{_POOL.get()}-gateway-0"))

        async def start(pool: str) -> None:
            _POOL.set(pool)
            async with limit:
                replica = GatewayReplica(_options(home, kubeconfig, namespace, pool), Key(namespace, pool))
                await replica._start(stack, shutdown)  # noqa: SLF001 - `run` would end with the first of them

        async with asyncio.TaskGroup() as starts:
            for pool in pools:
                starts.create_task(start(pool))
        server = await asyncio.start_server(
            lambda reader, writer: _serve(gateways, reader, writer), host="127.0.0.1", port=0
        )
        print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        server.close()
        shutdown.requested.set()
        shutdown.forced.set()


def _options(home: Path, kubeconfig: Path, namespace: str, pool: str) -> RunOptions:
    settings = Settings.model_validate(
        {
            "kubernetes": {"kubeconfig": kubeconfig},
            "gateway": {"address": Address("127.0.0.1", 0), "pool": Key(namespace, pool)},
            "metrics": {"address": Address("127.0.0.1", 0)},
        }
    )
    return RunOptions(home=home, cache=home, backend="kubernetes", settings=settings)


if __name__ == "__main__":
    raise_limit()
    sys.setswitchinterval(SWITCH_INTERVAL)
    _, kubeconfig, namespace, *pools = sys.argv
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run(Path(kubeconfig), namespace, pools))
