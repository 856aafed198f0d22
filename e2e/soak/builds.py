"""Runs clients that allocate, build and release on an appliance for a given time, and counts what is left.

It counts the process itself from inside (hook/), its metrics, its store and its directories. The builds are those of
the chaos run without faults. A failed build is a failure of the soak.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from chaos.client import Client, Record
from chaos.damage import wrong_in_log
from chaos.history import builds, judge
from chaos.run import CLIENTS, HEALED, WORKERS, compile_program, world
from soak.growth import Row, compare

from bkpool.core.worker import REMEMBERED_LEASES
from bkpool.store.sqlite import HISTORY
from harness import Appliance, eventually
from support.issuer import Issuer

WARM = 3.0
"""Seconds of builds, again and again before the first count."""
MOST_WARM = 60
LONGEST = 0.4
"""The most seconds for the only step of a build. Many short builds leave more behind than a few long ones."""
SETTLED = 30.0
"""Seconds for the appliance to have as few objects as before, once its workers are idle."""
TOLERANCES = {"rss": 12 * 1024.0}
"""In KiB. The process has 90 MiB. Its caches of certificates, tokens and keys have a bound, and fill slowly."""
OBJECTS = 2.0 * WORKERS
"""Each kind of objects may grow by so many. What each lease, build or connection leaves behind grows by dozens. How
many copies there are of the last heartbeat, of the last event of a watch or of a key differs from moment to moment.
The workers of a pool are also kept by the owners of their caches, and there are sometimes more owners."""
HOOK = {"PYTHONPATH": str(Path(__file__).parent / "hook")}


def soak(base: Path, seconds: float, report: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """Builds for this time. Returns the counts before and after, and other errors."""
    census = base / "census.json"
    with world("process", base, {**HOOK, "BKPOOL_SOAK_CENSUS": str(census)}) as (appliance, damage, issuer):
        builders = Builders(appliance, issuer, base)
        report("warming up: each worker gets as many ended leases as it can remember")
        _fill(appliance)
        _warm_up(builders, appliance.home, report)
        before = _count(appliance, census)
        wrong = builders.build(seconds, "history", report)
        rows = _settled(lambda: compare(before, _count(appliance, census), TOLERANCES, objects=OBJECTS))
        wrong += [*damage.left_over(), *wrong_in_log(appliance), *damage.left_behind()]
        return rows, wrong


class Builders:
    """The clients of the chaos run, without faults."""

    def __init__(self, appliance: Appliance, issuer: Issuer, base: Path) -> None:
        self._appliance = appliance
        self._issuer = issuer
        self._base = base
        self._program = base / "program"
        compile_program(self._program)
        for name in CLIENTS:
            (base / name).mkdir()

    def build(self, seconds: float, name: str, report: Callable[[str], None]) -> list[str]:
        """Builds for this time, and records a history under this name. Returns the errors in it."""
        record, done = Record(self._base / f"{name}.jsonl"), threading.Event()
        record.note("driver", "calm")
        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            running = [pool.submit(self._client(client, record, done).run) for client in CLIENTS]
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(1, left))
                report(f"{name}: {len(builds(list(record.events)))} builds, {max(0, left):.0f} s to go")
            done.set()
            for one in running:
                one.result()
        record.note("driver", "healed", seconds=0)
        record.close()
        return judge(record.events)

    def _client(self, name: str, record: Record, done: threading.Event) -> Client:
        def bearer() -> str:
            return self._issuer.token(actor=name.partition(".")[0])

        return Client(name, bearer, self._appliance, record, self._base / name, self._program, 0, done, LONGEST)


def _warm_up(builders: Builders, home: Path, report: Callable[[str], None]) -> None:
    """Builds until the gateway has written its heartbeat: it does so every 20 s, if a lease is in use then."""
    for number in range(MOST_WARM):
        builders.build(WARM, f"warm-{number}", report)
        if "stored BuildKitGateway" in _stored(home / "state.db"):
            return
    raise AssertionError(f"no heartbeat in {MOST_WARM * WARM:.0f} s of builds")


def _fill(appliance: Appliance) -> None:
    """Leases all workers at once, repeatedly."""
    for _ in range(REMEMBERED_LEASES + 2):
        leases = []
        for _ in range(WORKERS):
            status, lease = appliance.http("POST", "/api/v1/workers/allocate", {"poolName": "default"})
            assert status == 200, lease
            leases.append(lease)
        for lease in leases:
            appliance.http("POST", "/api/v1/workers/release", {"token": lease["token"]})


def _settled(compared: Callable[[], list[Row]]) -> list[Row]:
    deadline = time.monotonic() + SETTLED
    while True:
        rows = compared()
        if all(row.well for row in rows) or time.monotonic() > deadline:
            return rows
        time.sleep(1)


def _count(appliance: Appliance, census: Path) -> dict[str, Any]:
    """Counts the appliance when every worker is idle."""
    appliance.all_idle(HEALED)
    census.unlink(missing_ok=True)
    os.kill(appliance.described["pid"], signal.SIGUSR1)
    eventually(census.exists, "the appliance has written its census")
    home = appliance.home
    series = [line for line in appliance.metrics().splitlines() if line and not line.startswith("#")]
    return {
        **json.loads(census.read_text()),
        "series": len(series),
        "active connections": sum(
            float(line.split()[-1]) for line in series if line.startswith("buildkit_gateway_active_connections")
        ),
        "leases": appliance.pool()["allocated"],
        **_stored(home / "state.db"),
        "slot directories": len(list((home / "slots").glob("*/*/*"))),
        "caches set aside": len(list((home / "slots").rglob("wiped-*"))),
        "processes of workers": len(appliance.daemons()),
    }


def _stored(file: Path) -> dict[str, float]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        kinds = dict(database.execute("SELECT kind, COUNT(*) FROM objects GROUP BY kind"))
        (events,) = database.execute("SELECT COUNT(*) FROM events").fetchone()
    stored = {f"stored {kind}": count for kind, count in kinds.items()}
    return {**stored, "events beyond those kept": max(0, events - HISTORY)}
