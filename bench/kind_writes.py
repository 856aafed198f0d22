"""Warm leases on kind beside bare writes of the same objects, in turns: what bkpool adds to the API server's time.

A bare write replaces an idle worker with one more annotation, by a client of the API server alone. It is the same
request as a claim, of an object of the same size, with the same watchers. It judges nothing.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from bench.appliance import AT_ONCE, burst
from bench.table import percentile, spread
from bkpool.core.errors import Conflict
from bkpool.core.worker import Worker
from bkpool.kube import ClusterAccess, Doc, KubeApi, paths

_ANNOTATION = "bench"
_RESTS = 1.5
"""Seconds between writes and leases. What is written late after a lease is written within one. And a claim by a copy
that has not seen a bare write yet would be refused."""
_SINGLE = 4
"""Single writes and leases for each burst."""


async def beside_writes(base: str, bearer: str, kubeconfig: Path, runs: int) -> dict[str, str]:
    """Measures leases with a `jobId`, and bare writes.

    Args:
        base: The API, with its version.
        bearer: The admin's token.
        kubeconfig: Of the cluster.
        runs: How many bursts of each kind there are.
    """
    api = await KubeApi.connect(ClusterAccess(kubeconfig))
    connector, headers = aiohttp.TCPConnector(limit=0), {"Authorization": f"Bearer {bearer}"}
    leases: dict[int, list[list[float]]] = {1: [], AT_ONCE: []}
    writes: dict[int, list[list[float]]] = {1: [], AT_ONCE: []}
    try:
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            for number in range(runs + 1):
                for count in (AT_ONCE, *[1] * _SINGLE):
                    await asyncio.sleep(_RESTS)
                    written = await _bare_writes(api, count)
                    await asyncio.sleep(_RESTS)
                    leased = await burst(session, base, count, job_ids=True)
                    if number:  # in the first one connections are made, and caches get their owner
                        writes[count].append(written)
                        leases[count].append(leased)
    finally:
        await api.close()
    return shown(leases, writes)


async def _bare_writes(api: KubeApi, count: int) -> list[float]:
    """Writes this many workers at once. Returns the seconds of each write that succeeded."""
    docs, _ = await api.list(paths.custom(Worker.PLURAL))
    took: list[float] = []

    async def one(doc: Doc) -> None:
        annotations = doc["metadata"].setdefault("annotations", {})
        annotations[_ANNOTATION] = str(int(annotations.get(_ANNOTATION, "0")) + 1)
        begin = time.perf_counter()
        with suppress(Conflict):  # the controller has written meanwhile
            await api.replace(paths.custom(Worker.PLURAL, *paths.key_of(doc)), doc)
            took.append(time.perf_counter() - begin)

    await asyncio.gather(*map(one, docs[:count]))
    return took or await _bare_writes(api, count)


def shown(leases: dict[int, list[list[float]]], writes: dict[int, list[list[float]]]) -> dict[str, Any]:
    """The figures: seconds of each call of each burst, by how many there were at once."""
    table: dict[str, Any] = {}
    for count, how in ((1, "one at a time"), (AT_ONCE, f"{AT_ONCE} at once")):
        for what, bursts in (("warm allocate with a jobId", leases), ("bare write", writes)):
            calls = [seconds for burst in bursts[count] for seconds in burst]
            values = [f"{percentile(calls, share) * 1000:.1f}" for share in (0.5, 0.99)]
            table[f"{what}, {how}, ms p50 / p99"] = " / ".join(values)
        pairs = list(zip(leases[count], writes[count], strict=True))
        medians = [statistics.median(ours) / statistics.median(bare) for ours, bare in pairs]
        table[f"ratio of the medians, {how}"] = spread(medians)
        if count > 1:
            table[f"ratio of the last of {count}"] = spread([max(ours) / max(bare) for ours, bare in pairs])
    return table
