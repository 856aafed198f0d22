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

Bursts = dict[int, list[list[float]]]
"""Seconds of each call of each burst, by how many calls there were at once."""

WRITE = "bare write"
WITH_JOB = "warm allocate with a jobId"
WITHOUT_JOB = "warm allocate"

_ANNOTATION = "bench"
_RESTS = 1.5
"""Seconds before each write and lease. What is written late after a lease is written within one. A claim by a copy
that has not seen a bare write yet would be refused."""
_SINGLE = 4
"""Single writes and leases for each burst."""


async def beside_writes(base: str, bearer: str, kubeconfig: Path, runs: int) -> dict[str, str]:
    """Measures leases with and without a `jobId`, and bare writes. Before each there is the same rest.

    Args:
        base: The API, with its version.
        bearer: The admin's token.
        kubeconfig: Of the cluster.
        runs: How many bursts of each kind there are.
    """
    api = await KubeApi.connect(ClusterAccess(kubeconfig))
    connector, headers = aiohttp.TCPConnector(limit=0), {"Authorization": f"Bearer {bearer}"}
    found: dict[str, Bursts] = {what: {1: [], AT_ONCE: []} for what in (WRITE, WITH_JOB, WITHOUT_JOB)}
    try:
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            for number in range(runs + 1):
                for count in (AT_ONCE, *[1] * _SINGLE):
                    for what, bursts in found.items():
                        await asyncio.sleep(_RESTS)
                        if what == WRITE:
                            seconds = await _bare_writes(api, count)
                        else:
                            seconds = await burst(session, base, count, job_ids=what == WITH_JOB)
                        if number:  # in the first one connections are made, and caches get their owner
                            bursts[count].append(seconds)
    finally:
        await api.close()
    return shown(found)


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


def shown(found: dict[str, Bursts]) -> dict[str, Any]:
    """The figures, and how leases compare with the bare writes."""
    table: dict[str, Any] = {}
    for count, how in ((1, "one at a time"), (AT_ONCE, f"{AT_ONCE} at once")):
        for what, bursts in found.items():
            calls = [seconds for burst in bursts[count] for seconds in burst]
            values = [f"{percentile(calls, share) * 1000:.1f}" for share in (0.5, 0.99)]
            table[f"{what}, {how}, ms p50 / p99"] = " / ".join(values)
        for what in (WITH_JOB, WITHOUT_JOB):
            pairs = list(zip(found[what][count], found[WRITE][count], strict=True))
            medians = [statistics.median(ours) / statistics.median(bare) for ours, bare in pairs]
            table[f"{what} ÷ {WRITE}, {how}, medians"] = spread(medians)
            if count > 1:
                table[f"{what} ÷ {WRITE}, the last of {count}"] = spread([max(a) / max(b) for a, b in pairs])
    return table
