"""`bkpool down`: stops the appliance and waits until it has ended.

It signals only the process that holds the lock of this home. A `down` while the appliance drains already joins that
drain: only `--now` cuts builds. Every wait ends, also if the appliance hangs.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Self

import click

from bkpool.cli import console, drain_view, home, options, running_settings
from bkpool.cli.errors import INTERRUPTED
from bkpool.core.errors import HostFault
from bkpool.home.holder_process import HolderProcess

POLL_INTERVAL = 1.0
"""Seconds between two questions for the open builds that are shown."""
END_TIMEOUT = 120.0
"""Seconds for an appliance to end, beyond the time that its builds have. It stops every worker in them."""


@click.command(short_help="Stop the appliance; open builds may finish first.")
@click.option("--now", is_flag=True, help="Close open connections at once; their builds fail.")
@click.option(
    "--purge", is_flag=True, help="Also remove all state and caches: leases, keys, build caches, remembered options."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --purge removes everything.")
@options.as_json
def command(now: bool, purge: bool, yes: bool, as_json: bool) -> int:
    """Stop the appliance of this machine and wait until it has ended.

    Running builds may finish first. Ctrl-C ends only this command; the appliance goes on draining, and another `down`
    waits for it again. On a terminal, --purge asks first.
    """
    if purge and not yes and not _confirmed():
        console.note("nothing was changed")
        return 1
    process = HolderProcess.find(home.home())
    if process is not None:
        try:
            _end(process, now=now)
        except KeyboardInterrupt:
            console.note("\nthe appliance goes on draining; `bkpool down --now` closes the open connections")
            return INTERRUPTED
        finally:
            process.close()
    left = 0 if process is not None or purge else _stop_leftover_workers()
    if purge:
        _purge()
    stopped = "bkpool is down" if process is not None else "no appliance is running"
    also = (
        ", and state and caches are removed"
        if purge
        else f"; {left} workers of a killed appliance were stopped"
        if left
        else ""
    )
    answer = {"stopped": process is not None, "purged": purge, "leftovers": left}
    console.answer(answer, as_json=as_json, show=lambda: stopped + also)
    return 0


def _stop_leftover_workers() -> int:
    """Stops the workers that a killed appliance left running."""
    if not (home.home() / "slots").exists():
        return 0
    from bkpool.appliance import stop_leftover_workers  # noqa: PLC0415 - it imports everything heavy
    from bkpool.cli import tools  # noqa: PLC0415
    from bkpool.toolchain import default_cache  # noqa: PLC0415

    tools.quiet_logging()
    return stop_leftover_workers(home.home(), default_cache())


def _purge() -> None:
    from bkpool.appliance import purge  # noqa: PLC0415 - it imports everything heavy
    from bkpool.cli import tools  # noqa: PLC0415
    from bkpool.toolchain import default_cache  # noqa: PLC0415

    tools.quiet_logging()
    with console.Progress("removing state and caches"):
        left = purge(home.home(), default_cache())
        shutil.rmtree(home.home() / "leases", ignore_errors=True)  # `allocate` writes there
    if left:
        console.note(left)


def _confirmed() -> bool:
    """Whether the user agrees that everything is removed. A script is not asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return click.confirm(
        f"This removes all leases, keys, build caches and remembered options in {home.home()}. Go on?", err=True
    )


def _end(process: HolderProcess, *, now: bool) -> None:
    """Asks the appliance to end and waits for it.

    Raises:
        HostFault: It does not end in its time.
    """
    if now:
        process.cut()
    else:
        process.drain()
    stage = _Stage.of_moment(now=now)
    deadline = monotonic() + stage.seconds
    with console.Progress("waiting for the appliance to end") as progress:
        while not process.ended(POLL_INTERVAL):
            current = _Stage.of_moment(now=now)
            if current.name != stage.name:
                stage, deadline = current, monotonic() + current.seconds
            if monotonic() >= deadline:
                raise HostFault(
                    f"the appliance (pid {process.pid}) {stage.fault}",
                    hint=f"It may hang: `bkpool logs` may say why. `kill -9 {process.pid}` ends it, and the next "
                    "`bkpool down` stops its workers.",
                )
            if stage.ask_builds:
                seen = drain_view.look(stage.until, datetime.now(UTC))
                progress.update(seen.headline, detail=seen.detail)


@dataclass(frozen=True, slots=True)
class _Stage:
    """How far an appliance has come with its end, and what that allows it."""

    name: str
    seconds: float
    """How long this stage may last."""
    fault: str
    """What is said when it lasts longer."""
    ask_builds: bool = False
    until: datetime | None = None

    @classmethod
    def of_moment(cls, *, now: bool) -> Self:
        """The stage at this moment; with `now`, no build is waited for."""
        appliance = home.running()
        if now or appliance is None:
            return cls("closing", END_TIMEOUT, f"was told to end, and has not ended within {END_TIMEOUT:g} s")
        until = appliance.draining_until
        if until is None:
            allowed = END_TIMEOUT + (0 if appliance.tells_drain else running_settings.drain_timeout(appliance.pid))
            return cls("asked", allowed, f"has not begun to end within {allowed:g} s", ask_builds=True)
        left = max(0.0, (until - datetime.now(UTC)).total_seconds())
        fault = f"should have cut its builds at {until.astimezone():%H:%M:%S}, and still runs"
        return cls(f"draining until {until}", left + END_TIMEOUT, fault, ask_builds=True, until=until)
