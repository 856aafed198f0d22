"""Measures what the appliance adds to BuildKit, as ratios and differences within one run: leases, builds, commands.

It uses what the end-to-end tests use (e2e/harness.py). It is no test: it judges nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench.table import percentile, spread
from bench.worker_network import worker_network
from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.toolchain import Tool, Toolchain, default_cache
from bkpool.workers.probe import probe
from harness import Appliance, oidc_config, pool
from support.issuer import AUDIENCE, Issuer
from worlds import Processes

CONTEXT_MB = 200
AT_ONCE = 20


@contextmanager
def appliance(tools: dict[str, Path], spec: dict[str, Any]) -> Iterator[Appliance]:
    base = Path(tempfile.mkdtemp(prefix="bkpool-bench-"))
    made = Appliance(base, tools, Processes())
    try:
        made.up_with(spec)
        yield made
    finally:
        made.down("--now", "--purge")
        shutil.rmtree(base)


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# --- allocate -------------------------------------------------------------------------------------------------------


async def burst(session: aiohttp.ClientSession, base: str, count: int, *, job_ids: bool = False) -> list[float]:
    """Allocates `count` times at once, and returns the seconds of each call. Releases all of them.

    With `job_ids` each call names a job of its own.
    """
    tokens = []

    async def one() -> float:
        asked = {"poolName": "default", **({"jobId": uuid4().hex} if job_ids else {})}
        begin = time.perf_counter()
        async with session.post(f"{base}/workers/allocate", json=asked) as answer:
            lease = await answer.json()
        assert answer.status == 200, lease
        tokens.append(lease["token"])
        return time.perf_counter() - begin

    took = await asyncio.gather(*(one() for _ in range(count)))
    for token in tokens:
        async with session.post(f"{base}/workers/release", json={"token": token}) as answer:
            assert answer.status == 200
    while True:
        async with session.get(f"{base}/pools/default") as answer:
            state = await answer.json()
        if state["idle"] == state["workers"] >= count:
            return took
        await asyncio.sleep(0.02)


def warm_allocate(tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures whole HTTP calls with warm workers: one at a time, and 20 at once."""
    with appliance(tools, {"scaling": {"min": AT_ONCE, "max": AT_ONCE}}) as running:
        running.all_idle()
        return warm_allocate_on(running, runs)


def api_of(running: Appliance) -> tuple[str, str]:
    """Returns the URL of the API, and the admin's token."""
    return f"http://127.0.0.1:{running.ports['api']}/api/v1", (running.home / "admin.token").read_text().strip()


def warm_allocate_on(running: Appliance, runs: int) -> dict[str, Any]:
    """The same on a running appliance that has enough idle workers."""

    async def measure(running: Appliance) -> tuple[list[float], list[float]]:
        base, bearer = api_of(running)
        headers = {"Authorization": f"Bearer {bearer}"}
        connector = aiohttp.TCPConnector(limit=0)
        single, many = [], []
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            await burst(
                session, base, AT_ONCE
            )  # afterwards every worker has been used, so all caches belong to this caller
            for _ in range(max(runs, 5)):
                many += await burst(session, base, AT_ONCE)
                for _ in range(4):
                    single += await burst(session, base, 1)
        return single, many

    single, many = asyncio.run(measure(running))
    return {
        "warm allocate, one at a time, ms p50 / p99": f"{_ms(single, 0.5)} / {_ms(single, 0.99)}",
        f"warm allocate, {AT_ONCE} at once, ms p50 / p99": f"{_ms(many, 0.5)} / {_ms(many, 0.99)}",
    }


def _ms(values: list[float], share: float) -> str:
    return f"{percentile(values, share) * 1000:.1f}"


def cold_allocate(tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures a call without a worker until its answer, and a bare buildkitd from exec to its first answer."""
    ours, bare = [], []
    with appliance(tools, {"scaling": {"max": 1, "scaleDownDelay": "0s"}}) as running:
        for number in range(max(runs, 5) + 1):
            begin = time.perf_counter()
            status, lease = running.http("POST", "/api/v1/workers/allocate", {"poolName": "default"})
            took = time.perf_counter() - begin
            assert status == 200, lease
            running.http("POST", "/api/v1/workers/release", {"token": lease["token"]})
            while running.pool()["workers"]:
                time.sleep(0.02)
            alone = _bare_buildkitd(tools)
            if number:  # leaves out the first of each, because disk caches are cold
                ours.append(took)
                bare.append(alone)
    beyond = [(a - b) * 1000 for a, b in zip(ours, bare, strict=True)]
    return {
        "buildkitd alone, exec to first answer, ms": spread([value * 1000 for value in bare]),
        "cold allocate, ms": spread([value * 1000 for value in ours]),
        "cold allocate beyond buildkitd, ms": spread(beyond),
    }


def _bare_buildkitd(tools: dict[str, Path]) -> float:
    with tempfile.TemporaryDirectory(prefix="bkbare-") as directory:
        socket = f"{directory}/s"
        config = Path(directory) / "c.toml"
        config.write_text(f'[worker.oci]\nenabled = true\nbinary = "{tools["runc"]}"\n')
        begin = time.perf_counter()
        daemon = subprocess.Popen(
            [
                str(tools["buildkitd"]),
                "--config",
                str(config),
                "--root",
                f"{directory}/root",
                "--addr",
                f"unix://{socket}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            asyncio.run(_answered(socket))
            return time.perf_counter() - begin
        finally:
            daemon.kill()
            daemon.wait()
            subprocess.run(
                ["umount", "-q", f"{directory}/root/runc-overlayfs"], check=False, stderr=subprocess.DEVNULL
            )


async def _answered(socket: str) -> None:
    while True:
        with suppress(Unavailable, WorkerFailed):
            await probe(Path(socket))
            return
        await asyncio.sleep(0.005)


# --- build ----------------------------------------------------------------------------------------------------------


def build_through_gateway(tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures a build with 200 MB of new context, alternately through the gateway and on the worker's socket."""
    through: list[float] = []
    direct: list[float] = []
    with appliance(tools, {"scaling": {"max": 1}}) as running:
        certificates = running.allocate()
        gateway = running.builder(certificates, "gateway")
        running.buildx("create", "--name", "direct", "--driver", "remote", certificates.lease["endpoint"]).ok()
        for number in range(max(runs, 5) + 1):
            for builder, into in ((gateway, through), ("direct", direct)):
                with with_context(running.base) as context:
                    took = running.build(builder, context).ok().seconds
                if number:
                    into.append(took)
    ratios = [a / b for a, b in zip(through, direct, strict=True)]
    return {
        f"build with {CONTEXT_MB} MB of context on the worker's socket, s": spread(direct),
        "the same through the gateway, s": spread(through),
        "ratio gateway / socket": spread(ratios),
    }


@contextmanager
def with_context(base: Path) -> Iterator[Path]:
    directory = base / "context"
    directory.mkdir()
    with (directory / "data").open("wb") as data:
        for _ in range(CONTEXT_MB):
            data.write(os.urandom(1024 * 1024))
    (directory / "Dockerfile").write_text("FROM scratch\nCOPY data /\n")
    yield directory
    shutil.rmtree(directory)


# --- command line ---------------------------------------------------------------------------------------------------


def command_line(tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures `bkpool allocate` as a process and the HTTP call that it makes, alternately."""
    process, call = [], []
    with appliance(tools, {"scaling": {"min": 1, "max": 2}}) as running:
        running.all_idle()
        env = running.env
        for number in range(max(runs * 2, 10) + 1):
            begin = time.perf_counter()
            done = subprocess.run([*running.program, "allocate"], env=env, capture_output=True, text=True, check=True)
            a = time.perf_counter() - begin
            _back(running, json.loads(done.stdout))
            begin = time.perf_counter()
            _, lease = running.http("POST", "/api/v1/workers/allocate", {"poolName": "default"})
            b = time.perf_counter() - begin
            _back(running, lease)
            if number:
                process.append(a * 1000)
                call.append(b * 1000)
    return {
        "HTTP call alone, ms": spread(call),
        "`bkpool allocate`, ms": spread(process),
        "CLI beyond the call, ms": spread([a - b for a, b in zip(process, call, strict=True)]),
    }


def who_is_calling(tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures a warm allocate with an ID token and with the admin's token, alternately. 100 pools have rules."""
    believed = {"audience": AUDIENCE, "claimsMapping": {"user": "actor"}}
    auth = {"rbac": {"rules": [{"users": ["alice"]}]}}
    known: dict[str, list[float]] = {"admin": [], "alice": []}
    with Issuer() as issuer, tempfile.TemporaryDirectory(prefix="bkpool-bench-") as base:
        running = Appliance(Path(base), tools, Processes())
        objects = [oidc_config("ci", issuer=issuer.url, **believed), pool("default", scaling={"max": 2}, auth=auth)]
        running.up_from(objects + [pool(f"other-{n}", auth=auth) for n in range(99)])
        try:
            bearers = {"admin": "admin", "alice": issuer.token(actor="alice")}
            for number in range(max(runs * 5, 25) + 1):
                for name, bearer in bearers.items():
                    begin = time.perf_counter()
                    path = "/api/v1/workers/allocate"
                    status, lease = running.http("POST", path, {"poolName": "default"}, bearer=bearer)
                    seconds = time.perf_counter() - begin
                    assert status == HTTPStatus.OK, lease
                    _back(running, lease)
                    if number:  # leaves out the first one, which starts the worker
                        known[name].append(seconds * 1000)
        finally:
            running.finish()
    beyond = [a - b for a, b in zip(known["alice"], known["admin"], strict=True)]
    return {
        "warm allocate, the admin's token, ms": spread(known["admin"]),
        "warm allocate, an ID token and a rule, ms": spread(known["alice"]),
        "ID token beyond the admin's, ms": spread(beyond),
    }


def _back(running: Appliance, lease: dict[str, Any]) -> None:
    running.http("POST", "/api/v1/workers/release", {"token": lease["token"]})
    while running.pool()["allocated"]:
        time.sleep(0.01)


def programs() -> dict[str, Path]:
    """Returns the programs that the parts run."""
    wanted = [Tool.BUILDKITD, Tool.BUILDX, Tool.RUNC]
    return {str(tool): path for tool, path in Toolchain(default_cache()).ensure_all(wanted).items()}


PARTS = (warm_allocate, cold_allocate, build_through_gateway, command_line, who_is_calling, worker_network)
