"""The cluster without nodes that bench/cluster.py measures against: a fake API server, in a process of its own.

Its processor time is not that of bkpool. Pods run at once, and one stub answers for every buildkitd, over mutual TLS
at the pod's own address. It reads commands from standard input and answers each with a line of JSON.

usage: python -m bench.cluster_server
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

from bench.cluster_workers import copies
from bkpool.appliance.kube_secrets import PKI
from bkpool.core.worker import Worker
from bkpool.gateway.control.server import new_loop
from bkpool.toolchain.descriptor_limit import raise_limit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.fake_api_server import FakeApiServer, fake_api_server
from support.fake_kinds import Where
from support.fake_kubelet import FakeKubelet
from support.fake_workers import FakeWorkers

NAMESPACE, SYSTEM = "default", "bkpool-system"


async def serve() -> None:
    """Runs until standard input ends."""
    network = f"127.{random.randint(10, 250)}"  # noqa: S311 - so that two runs have other addresses
    async with fake_api_server(namespaces=(NAMESPACE, SYSTEM)) as server:
        workers = FakeWorkers(server.objects)
        kubelet = FakeKubelet(server.objects, network=network, run=workers.run, ended=workers.ended)
        print(json.dumps({"url": server.url}), flush=True)
        try:
            await _obey(server, workers, kubelet)
        finally:
            await kubelet.close()
            await workers.close()


async def _obey(server: FakeApiServer, workers: FakeWorkers, kubelet: FakeKubelet) -> None:
    """Answers commands. `fill 40` gives each pool 40 workers."""

    async def reset() -> None:
        server.reset_counts()
        workers.calls = 0

    async def counts() -> dict[str, Any]:
        return _counts(server) | {"probes": workers.calls}

    async def leased() -> int:
        return sum("allocation" in doc["spec"] for doc in _documents(server))

    async def idle() -> int:
        return sum(doc.get("status", {}).get("phase") == "Idle" for doc in _documents(server))

    async def fill(each: str) -> None:
        objects = server.objects
        secrets = objects.get(Where("v1", "secrets", SYSTEM, PKI)).doc
        version = count(objects.version + 1)
        made = [*copies(objects.documents(), secrets, int(each), kubelet.next_address, version.__next__)]
        objects.restore(made)
        for doc in made:
            if doc["kind"] == "Pod":
                await workers.run(doc)

    commands: dict[str, Callable[..., Awaitable[Any]]] = {
        command.__name__: command for command in (reset, counts, leased, idle, fill)
    }
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().split():
        name, *arguments = line
        print(json.dumps(await commands[name](*arguments)), flush=True)


def _documents(server: FakeApiServer) -> list[dict[str, Any]]:
    found = next(kept for (_, plural), kept in server.objects.collections.items() if plural == Worker.PLURAL)
    return [stored.doc for stored in found.objects.values()]


def _counts(server: FakeApiServer) -> dict[str, Any]:
    """What was asked, as lists, because JSON has no tuples."""
    return {
        "requests": [[*what, times] for what, times in server.counts.items()],
        "watch_bytes": [[*what, times] for what, times in server.watch_bytes.items()],
        "watch_events": [[*what, times] for what, times in server.watch_events.items()],
    }


if __name__ == "__main__":
    raise_limit()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())
