"""`nox -s chaos`: four clients build in a loop while the appliance, its workers and its cluster are broken at random.

usage: nox -s chaos [-- --minutes N] [-- --seed S] [-- --backend kind]     The same seed gives the same faults.

It starts everything and records it. schedule.py decides what is broken and when. history.py finds what was wrong.
See docs/testing.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from chaos.client import Client, Record
from chaos.damage import Damage, ForegroundAppliance, ProcessDamage, small_home, victim, wrong_in_log
from chaos.history import Event, builds, judge, load, stragglers
from chaos.schedule import LANES, Fault, schedule
from chaos.timeline import draw

from bkpool.core.worker import UNDELIVERED_LIFE
from bkpool.toolchain import Tool, Toolchain, default_cache
from harness import Appliance, eventually, oidc_config, pool
from support.environment import forget_settings
from support.issuer import AUDIENCE, Issuer
from worlds import Processes

PROGRAM = Path(__file__).parents[1] / "program"
CLIENTS = ("ann.1", "ann.2", "bob.1", "bob.2")
"""Two tenants with two clients each."""
WORKERS = 3
"""Fewer than clients, so that a client always waits, and workers go from one tenant to the other."""
HEALED = UNDELIVERED_LIFE.total_seconds() + 60
"""Seconds after the last fault within which all workers must be idle. A worker that was killed repeatedly is
restarted with pauses (bkpool.core.reconcile.failures): half a minute after six failures in a row. A caller who hangs
up just after their answer has arrived may have read it. So their lease lives for two more minutes (decision 27)."""
SHOWN = 40
"""The most violations that are printed after a run. One fault may lead to hundreds."""
FINISHED = 180.0
"""Seconds for the clients to end, after one more build each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--backend", choices=sorted(LANES), default=os.environ.get("BKPOOL_E2E_BACKEND", "process"))
    parser.add_argument("--keep", action="store_true", help="keep history and logs also if nothing was wrong")
    parser.add_argument("--plan", action="store_true", help="only print what would be broken, and when")
    parser.add_argument("--judge", type=Path, metavar="HISTORY", help="only judge a history, and draw it again")
    options = parser.parse_args()
    forget_settings()
    if options.judge:
        return report(load(options.judge.read_text()), options.judge, "", sys.maxsize)
    faults = schedule(options.seed, options.minutes * 60, options.backend)
    repeat = f"nox -s chaos -- --backend {options.backend} --minutes {options.minutes:g} --seed {options.seed}"
    print(f"chaos: {len(faults)} faults; to repeat: {repeat}", flush=True)
    if options.plan:
        for fault in faults:
            print(f"{fault.at:7.2f} s  {fault.kind:<15} for {fault.seconds:.2f} s, victim {fault.victim}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that faults are always undone
    base = Path(tempfile.mkdtemp(prefix="bkpool-chaos-"))
    record = Record(base / "history.jsonl")
    try:
        with (
            small_home(base / "appliance"),
            world(options.backend, base, process_appliance=ForegroundAppliance) as (appliance, damage, issuer),
        ):
            Run(appliance, damage, issuer, record, base, options).go(faults)
    finally:
        record.close()
    wrong = report(record.events, record.file, repeat, keep=options.keep)
    if not wrong and not options.keep:
        shutil.rmtree(base)
    return wrong


@contextmanager
def world(
    backend: str,
    base: Path,
    env: Mapping[str, str] | None = None,
    process_appliance: type[Appliance] = Appliance,
) -> Iterator[tuple[Appliance, Damage, Issuer]]:
    """Starts an appliance with two tenants and one pool. Yields it, the object that breaks it, and the issuer."""
    wanted = [Tool.BUILDKITD, Tool.BUILDX, Tool.RUNC]
    tools = {str(tool): path for tool, path in Toolchain(default_cache()).ensure_all(wanted).items()}
    with ExitStack() as stack:
        issuer = stack.enter_context(Issuer())
        believed = {"issuer": issuer.url, "audience": AUDIENCE, "claimsMapping": {"user": "actor"}, "pools": ["*"]}
        objects = [oidc_config("ci", **believed), pool("default", scaling={"min": 1, "max": WORKERS})]
        if backend == "kind":
            from chaos.damage_kind import kind_world  # noqa: PLC0415 - needs a container engine

            appliance, damage = stack.enter_context(kind_world(base, tools))
        else:
            appliance = process_appliance(base / "appliance", tools, Processes(), extra_env=dict(env or {}))
            damage = ProcessDamage(appliance, WORKERS)
            stack.callback(appliance.down, "--now", "--purge")
        appliance.up_from(objects)
        appliance.all_idle()
        yield appliance, damage, issuer


def compile_program(target: Path) -> None:
    """Compiles the only program of the test images."""
    env = {**os.environ, "CGO_ENABLED": "0"}
    subprocess.run(["go", "build", "-trimpath", "-o", str(target), "."], cwd=PROGRAM, env=env, check=True)


class Run:
    """One run: clients and faults in separate threads, and the checks after them."""

    def __init__(
        self, appliance: Appliance, damage: Damage, issuer: Issuer, record: Record, base: Path, options: Any
    ) -> None:
        self._appliance = appliance
        self._damage = damage
        self._record = record
        self._seconds = options.minutes * 60
        self._base = base
        self._done = threading.Event()
        self._ending = threading.Event()
        """Set if the run ends early: current faults are undone, and no further fault is carried out."""
        program = base / "program"
        compile_program(program)
        self._clients = []
        for name in CLIENTS:
            directory = base / name
            directory.mkdir()
            actor = name.partition(".")[0]
            bearer = lambda actor=actor: issuer.token(actor=actor)  # noqa: E731 - one for each client
            self._clients.append(
                Client(name, bearer, appliance, record, directory, program, options.seed, self._done)
            )

    def go(self, faults: list[Fault]) -> None:
        self._begun = self._record.note("driver", "begin", utc=datetime.now(UTC).isoformat()).at  # for the logs
        clients = [threading.Thread(target=client.run, name=client.name, daemon=True) for client in self._clients]
        lanes = [
            threading.Thread(target=self._break, args=([(n, f) for n, f in enumerate(faults) if f.lane == lane],))
            for lane in dict.fromkeys(fault.lane for fault in faults)
        ]
        for thread in (*clients, *lanes):
            thread.start()
        try:
            self._print_progress_until(lambda: self._record.now() - self._begun >= self._seconds)
        except BaseException:
            self._ending.set()
            self._record.over = True
            raise
        finally:
            for thread in lanes:
                thread.join()
        self._calm = self._record.note("driver", "calm").at
        self._done.set()
        begun = time.monotonic()
        self._print_progress_until(
            lambda: not any(t.is_alive() for t in clients) or time.monotonic() - begun > FINISHED
        )
        for thread in clients:
            if thread.is_alive():
                self._record.note("driver", "wrong", text=f"{thread.name} did not end within {FINISHED:g} s")
        self._record.over = True
        self._afterwards()

    def _break(self, faults: list[tuple[int, Fault]]) -> None:
        """Carries out one lane of the schedule, one fault after the other.

        If it takes longer than planned to undo a fault, the later faults are delayed. Otherwise the appliance would
        be down all the time on a slow machine. Faults that would end after the run are left out.
        """
        late = 0.0
        for number, fault in faults:
            if fault.at + late + fault.seconds > self._seconds:
                return
            if self._ending.wait(max(0.0, self._begun + fault.at + late - self._record.now())):
                return
            try:
                worker = victim(fault, self._damage.workers())
                if worker is None:
                    continue
                self._record.note(
                    "driver", "fault", number=number, kind=fault.kind, worker=worker, seconds=fault.seconds
                )
                mend = self._damage.do(fault, worker)
                self._record.note("driver", "fault-done", number=number)
                self._ending.wait(fault.seconds)
                mend()
            except Exception as error:  # noqa: BLE001 - every failure to undo a fault is recorded
                self._record.note("driver", "wrong", text=f"{fault.kind}: {error!r}")
            ended = self._record.note("driver", "fault-end", number=number).at - self._begun
            late = max(late, ended - fault.at - fault.seconds)

    def _afterwards(self) -> None:
        """Checks that the pool recovers, and looks for what is left over."""
        try:
            eventually(self._recovered, "every worker is ready and idle", timeout=HEALED)
            self._record.note("driver", "healed", seconds=round(self._record.now() - self._calm, 1))
        except Exception as error:  # noqa: BLE001
            self._record.note("driver", "wrong", text=f"the pool does not recover: {error!r}: {self._members()}")
        shutil.copytree(self._appliance.home / "logs", self._base / "logs", dirs_exist_ok=True)
        for look in (self._damage.left_over, lambda: wrong_in_log(self._appliance), self._damage.left_behind):
            try:
                for what in look():
                    self._record.note("driver", "left", text=what)
            except Exception as error:  # noqa: BLE001
                self._record.note("driver", "wrong", text=f"looking for what is left failed: {error!r}")

    def _recovered(self) -> bool:
        pool = self._appliance.pool()
        ready = {member["name"] for member in pool["members"]}
        return pool["idle"] == pool["workers"] > 0 and ready == set(self._damage.workers())

    def _members(self) -> Any:
        try:
            return self._appliance.pool()["members"]
        except Exception as error:  # noqa: BLE001
            return repr(error)

    def _print_progress_until(self, over: Any) -> None:
        """Prints the progress every few seconds until a condition holds."""
        printed_at = 0.0
        while not over():
            time.sleep(0.1)
            if (now := self._record.now()) - printed_at >= 5:
                printed_at = now
                events = list(self._record.events)
                made = builds(events)
                broken = sum(event.what == "fault" for event in events)
                print(
                    f"  {now - self._begun:4.0f} s of {self._seconds:.0f}: {sum(b.ok for b in made)} builds, "
                    f"{sum(not b.ok for b in made)} failed; {broken} faults",
                    flush=True,
                )


def report(history: list[Event], file: Path, repeat: str, shown: int = SHOWN, *, keep: bool = True) -> int:
    """Prints a summary, and the paths of history, picture and logs if they are kept. Returns the exit code."""
    events = sorted(history, key=lambda event: event.at)
    violations = judge(events)
    picture = file.with_name("timeline.svg")
    picture.write_text(draw(events, violations))
    made = builds(events)
    counts: dict[str, int] = {}
    for event in events:
        if event.what == "fault":
            counts[event.of["kind"]] = counts.get(event.of["kind"], 0) + 1
    healed = next((event.of["seconds"] for event in events if event.what == "healed"), None)
    rows = {
        "builds that succeeded": sum(build.ok for build in made),
        "builds that failed": sum(not build.ok for build in made),
        "leases": sum(e.what == "answer" and e.of["outcome"] == "lease" for e in events),
        "callers that hung up": sum(event.what == "hang-up" for event in events),
        "requests refused or cut": sum(
            e.what in {"answer", "released"} and e.of["outcome"] in {"refused", "cut"} for e in events
        ),
        **{f"fault {kind}": number for kind, number in sorted(counts.items())},
        "steps of an ended lease that still ran": len(stragglers(events)),
        "seconds until the pool had recovered": healed,
        "violations": len(violations),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    for text in violations[:shown]:
        print(f"VIOLATION {text}")
    if len(violations) > shown:
        print(f"and {len(violations) - shown} more; --judge {file} prints all of them")
    if violations or keep:
        print(f"history: {file}\npicture: {picture}\nlogs: {file.parent / 'logs'}")
    if violations and repeat:
        print(f"to repeat: {repeat}")
    return bool(violations)


if __name__ == "__main__":
    sys.exit(main())
