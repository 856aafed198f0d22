"""An appliance under clients that allocate, build and release, for as long as is asked; then it is counted.

What is counted: the process itself from inside (hook/), its metrics, its store and its directories. Builds are those
of the chaos run, with nothing broken: one that fails is a failure of the soak.
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
from chaos.run import CLIENTS, WORKERS, compile_program, world
from soak.growth import Row, compare

from bkpool.core.reconcile.lease_end import REMEMBERED_LEASES
from bkpool.store.sqlite import HISTORY
from harness import Appliance, eventually
from support.issuer import Issuer

WARM = 3.0
"""Seconds of builds before the first count."""
LONGEST = 0.4
"""Seconds for a build's one step: many short builds leave more behind than few long ones."""
SETTLED = 30.0
"""Seconds for the appliance to come to rest."""
TOLERANCES = {"rss": 12 * 1024.0}
"""KiB, for a process of 90 MiB whose caches of certificates, tokens and keys are bounded, and fill slowly."""
HOOK = {"PYTHONPATH": str(Path(__file__).parent / "hook")}


def soak(base: Path, seconds: float, tell: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """Builds for so long; returns what there was before and after, and what was wrong beside."""
    census = base / "census.json"
    with world("process", base, {**HOOK, "BKPOOL_SOAK_CENSUS": str(census)}) as (appliance, damage, issuer):
        builders = Builders(appliance, issuer, base)
        tell("warming up: every worker is to remember as many leases as it ever will")
        _fill(appliance)
        builders.build(WARM, "warm", tell)
        before = _count(appliance, census)
        wrong = builders.build(seconds, "history", tell)
        rows = _settled(lambda: compare(before, _count(appliance, census), TOLERANCES))
        wrong += [*damage.left_over(), *wrong_in_log(appliance), *damage.left_behind()]
        return rows, wrong


class Builders:
    """The clients of the chaos run, undisturbed."""

    def __init__(self, appliance: Appliance, issuer: Issuer, base: Path) -> None:
        self._appliance = appliance
        self._issuer = issuer
        self._base = base
        self._program = base / "program"
        compile_program(self._program)
        for name in CLIENTS:
            (base / name).mkdir()

    def build(self, seconds: float, name: str, tell: Callable[[str], None]) -> list[str]:
        """Builds for so long, with a history under this name; returns what was wrong in it."""
        record, done = Record(self._base / f"{name}.jsonl"), threading.Event()
        record.note("driver", "calm")
        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            running = [pool.submit(self._client(client, record, done).run) for client in CLIENTS]
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(1, left))
                tell(f"{name}: {len(builds(list(record.events)))} builds, {max(0, left):.0f} s to go")
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


def _fill(appliance: Appliance) -> None:
    """Leases on all workers at once, over and over."""
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
    """The appliance as it stands, with every worker idle."""
    appliance.all_idle()
    census.unlink(missing_ok=True)
    os.kill(appliance.described["pid"], signal.SIGUSR1)
    eventually(census.exists, "the appliance has counted itself")
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
