"""Measures what one lease costs in a cluster of many pools and workers, without nodes. It is no test.

The control replicas and the gateways are the real programs, each replica in a process of its own. The API server is a
fake one that counts what it is asked; pods run at once, and a stub answers for every buildkitd
(bench/cluster_server.py).

usage: nox -s bench -- --only cluster [--pools N] [--workers N] [--replicas N] [--seconds N]
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp

from bench.cluster_figures import CONTROL, DRIVER, GATEWAYS, ClusterFigures, ClusterSize, rows
from bench.cluster_processes import BenchProcess, free_port
from bkpool.appliance.kube_secrets import ADMIN
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.tokens import digest
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.store.kubernetes import KubernetesStore

NAMESPACE, SYSTEM = "default", "bkpool-system"
_LEASES_AT_ONCE = 16
_UNMEASURED = 0.2
"""The part of the time for which it leases before it measures, so that every cache in use has an owner."""
_RESTS = 3.0
"""Seconds until what is written with a delay has been written."""
_READY_WITHIN = 1800.0
_SHOWN_EVERY = 15.0


class ClusterBench:
    """One installation, and the load on it.

    Args:
        size: How large it is.
        directory: For kubeconfigs and logs.
        server: The API server.
        replicas: The control replicas, with the URL of each one's API.
        gateways: The gateways' process, and its port.
    """

    def __init__(
        self,
        size: ClusterSize,
        server: BenchProcess,
        replicas: Sequence[tuple[BenchProcess, str]],
        gateways: tuple[BenchProcess, int],
        bearer: str,
    ) -> None:
        self._size = size
        self._server = server
        self._replicas = replicas
        self._gateways, self._gateways_port = gateways
        self._headers = {"Authorization": f"Bearer {bearer}"}

    async def measured(self) -> ClusterFigures:
        """Leases for some time without measuring, and then for the time that was asked for."""
        await self._load(ClusterFigures(self._size), self._size.seconds * _UNMEASURED)
        await self._at_rest()
        await self._server.ask("reset")
        figures, before = ClusterFigures(self._size), self._cpu()
        begin = time.perf_counter()
        await self._load(figures, self._size.seconds)
        figures.lasted = time.perf_counter() - begin
        await self._at_rest()
        figures.cpu = {name: seconds - before[name] for name, seconds in self._cpu().items()}
        figures.counts = await self._server.ask("counts")
        figures.memory = [process.memory for process, _ in self._replicas]
        return figures

    def _cpu(self) -> dict[str, float]:
        return {
            CONTROL: sum(process.cpu for process, _ in self._replicas),
            GATEWAYS: self._gateways.cpu,
            "the API server": self._server.cpu,
        }

    async def _load(self, figures: ClusterFigures, seconds: float) -> None:
        until = time.perf_counter() + seconds
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, headers=self._headers) as session,
            asyncio.TaskGroup() as jobs,
        ):
            for number in range(min(_LEASES_AT_ONCE, self._size.workers)):
                _, url = self._replicas[number % len(self._replicas)]
                jobs.create_task(self._lease_until(until, session, url, figures))

    async def _lease_until(
        self, until: float, session: aiohttp.ClientSession, url: str, figures: ClusterFigures
    ) -> None:
        """One job after another. They share a connection to the gateways' process, which stands for a lease's own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._gateways_port)

        async def gateway(command: str) -> str:
            writer.write(f"{command}\n".encode())
            return (await reader.readline()).decode().strip()

        try:
            while time.perf_counter() < until:
                pool = pool_name(random.randrange(self._size.pools))  # noqa: S311 - no secret
                trouble = await self._lease(pool, session, url, figures.took, gateway)
                figures.failed.update([trouble] if trouble else [])
        finally:
            writer.close()

    async def _lease(
        self,
        pool: str,
        session: aiohttp.ClientSession,
        url: str,
        took: list[float],
        gateway: Callable[[str], Awaitable[str]],
    ) -> str:
        """One lease of a CI job: allocated with a job's id, used by one connection, and released.

        Returns:
            What has failed; empty: nothing.
        """
        asked = {"poolName": pool, "jobId": uuid4().hex}
        begin = time.perf_counter()
        async with session.post(f"{url}/api/v1/workers/allocate", json=asked) as answer:
            lease = await answer.json()
        seconds = time.perf_counter() - begin
        if answer.status != HTTPStatus.OK:
            return str(lease)[:300]
        took.append(seconds)
        answered = await gateway(f"open {pool} {digest(lease['token'])}")
        if answered == "ok":
            await gateway(f"close {pool} {digest(lease['token'])}")
        async with session.post(f"{url}/api/v1/workers/release", json={"token": lease["token"]}) as answer:
            await answer.read()
        return "" if answered == "ok" else answered

    async def _at_rest(self) -> None:
        """Waits until no worker has a lease, and what is written late has been written."""
        async with asyncio.timeout(_READY_WITHIN):
            while await self._server.ask("leased"):  # noqa: ASYNC110 - another process is asked
                await asyncio.sleep(0.1)
        await asyncio.sleep(_RESTS)


def pool_name(number: int) -> str:
    """The name of a pool."""
    return f"p{number}"


async def measured(size: ClusterSize) -> ClusterFigures:
    """Makes the installation, measures it, and ends everything."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bkpool-bench-")))

        async def start(name: str, *arguments: str, env: dict[str, str] | None = None) -> BenchProcess:
            process = await BenchProcess.start(name, directory / f"{name}.log", *arguments, env=env)
            stack.push_async_callback(process.end)
            return process

        server = await start("server", "bench.cluster_server")
        url = (await server.read())["url"]
        configs = {user: _kubeconfig(directory, url, user) for user in (CONTROL, GATEWAYS, DRIVER)}
        api = await KubeApi.connect(ClusterAccess(configs[DRIVER]))
        stack.push_async_callback(api.close)
        await _make_pools(api, size)

        async def control(number: int) -> tuple[BenchProcess, str]:
            port = free_port()
            arguments = _control_arguments(configs[CONTROL], port)
            return await start(
                f"control-{number}", *arguments, env=_env(directory, number)
            ), f"http://127.0.0.1:{port}"

        first, _ = await control(0)
        await _until_idle(server, [first], size.pools)
        await first.end()
        await server.ask(f"fill {size.each}")
        await _scale(api, size)
        replicas = [await control(number) for number in range(size.replicas)]
        for process, url in replicas:
            await _until_ready(process, url)
        await _until_idle(server, [process for process, _ in replicas], size.pools * size.each)
        bearer = await _admin_token(api)
        pools = map(pool_name, range(size.pools))
        gateways = await start("gateways", "bench.cluster_gateways", str(configs[GATEWAYS]), NAMESPACE, *pools)
        port = (await gateways.read())["port"]
        return await ClusterBench(size, server, replicas, (gateways, port), bearer).measured()


def _kubeconfig(directory: Path, url: str, user: str) -> Path:
    """A kubeconfig whose token is the user's name, by which the server tells clients apart."""
    path = directory / f"kubeconfig-{user}"
    named = {"name": "fake"}
    context = {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "contexts": [{**named, "context": context}],
                "clusters": [{**named, "cluster": {"server": url}}],
                "users": [{**named, "user": {"token": user}}],
            }
        )
    )
    return path


def _control_arguments(kubeconfig: Path, port: int) -> list[str]:
    return [
        "bkpool",
        "up",
        "--backend=kubernetes",
        "--roles=api,controller",
        f"--namespace={SYSTEM}",
        f"--kubeconfig={kubeconfig}",
        f"--api-address=127.0.0.1:{port}",
        f"--metrics-address=127.0.0.1:{free_port()}",
    ]


def _env(directory: Path, number: int) -> dict[str, str]:
    return {"POD_NAME": f"control-{number}", "BKPOOL_HOME": str(directory / f"home-{number}")}


async def _make_pools(api: KubeApi, size: ClusterSize) -> None:
    """Makes the pools, each with one worker."""
    store = KubernetesStore(api)
    spec = PoolSpec.model_validate({"scaling": {"min": 1, "max": 1}})
    for number in range(size.pools):
        await store.create(Pool(metadata=Metadata(name=pool_name(number), namespace=NAMESPACE), spec=spec))


async def _scale(api: KubeApi, size: ClusterSize) -> None:
    """Gives the pools the number of workers that they have by now. No control replica runs."""
    scaling = {"spec": {"scaling": {"min": size.each, "max": size.each}}}
    for number in range(size.pools):
        await api.patch(paths.custom(Pool.PLURAL, NAMESPACE, pool_name(number)), scaling)


async def _until_idle(server: BenchProcess, replicas: Sequence[BenchProcess], wanted: int) -> None:
    shown = time.monotonic()
    async with asyncio.timeout(_READY_WITHIN):
        while (idle := await server.ask("idle")) < wanted:
            for process in replicas:
                process.check()
            if time.monotonic() - shown > _SHOWN_EVERY:
                shown = time.monotonic()
                print(f"{idle:,} of {wanted:,} workers are idle", file=sys.stderr)
            await asyncio.sleep(0.2)


async def _until_ready(replica: BenchProcess, url: str) -> None:
    async with asyncio.timeout(_READY_WITHIN), aiohttp.ClientSession() as session:
        while True:
            replica.check()
            with suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready") as answer:
                    if answer.status == HTTPStatus.OK:
                        return
            await asyncio.sleep(0.2)


async def _admin_token(api: KubeApi) -> str:
    secret = await api.get(paths.core("secrets", SYSTEM, ADMIN))
    return base64.b64decode(secret["data"]["token"]).decode()


def figures(size: ClusterSize) -> dict[str, Any]:
    """Measures, and returns what the benchmark's document has of it."""
    shown = f"{size.pools:,} pools, {size.workers:,} workers, {size.replicas} control replicas"
    print(f"measuring: leases in a cluster of {shown}", file=sys.stderr)
    what = f"{shown}, {size.seconds:g} s; a fake API server, and a stub for every buildkitd"
    return {"what": what, "rows": rows(asyncio.run(measured(size)))}
