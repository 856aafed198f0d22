"""`bkpool down`: stops the appliance and waits until it has ended.

It signals only the process that holds the lock of this home. It uses a pidfd, so it never signals another process
that got the same number.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
from contextlib import suppress

import click

from bkpool.cli import console, home, options
from bkpool.cli.client import Client
from bkpool.cli.errors import INTERRUPTED
from bkpool.core.errors import BkpoolError, HostFault
from bkpool.home.lock import holder

POLL_INTERVAL = 1.0
"""Seconds between two requests for the number of open connections that is shown."""


@click.command(short_help="Stop the appliance; open builds may finish first.")
@click.option("--now", is_flag=True, help="Close open connections at once; their builds fail.")
@click.option(
    "--purge", is_flag=True, help="Also remove all state and caches: leases, keys, build caches, remembered options."
)
@options.as_json
def command(now: bool, purge: bool, as_json: bool) -> int:
    """Stop the appliance of this machine and wait until it has ended.

    Running builds may finish first. Ctrl-C ends only this command; the appliance goes on draining.
    """
    process = _process()
    if process is not None:
        try:
            _end(process, now=now)
        except KeyboardInterrupt:
            console.note("\nthe appliance goes on draining; `bkpool down --now` closes the open connections")
            return INTERRUPTED
        finally:
            os.close(process)
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


def _process() -> int | None:
    """A pidfd of the appliance; None if there is none.

    Raises:
        HostFault: It belongs to another user.
    """
    pid = holder(home.home())
    if pid is None:
        return None
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if holder(home.home()) != pid:  # it has ended meanwhile, and the number may belong to another process
        os.close(process)
        return None
    return process


def _end(process: int, *, now: bool) -> None:
    wait_for = _waiting_for() or "waiting for the appliance to end"
    # Two signals with the same number may be merged into one; signals with different numbers are not.
    for number in (signal.SIGTERM, signal.SIGINT) if now else (signal.SIGTERM,):
        with suppress(ProcessLookupError):
            try:
                signal.pidfd_send_signal(process, number)
            except PermissionError:
                raise HostFault("the appliance belongs to another user", hint="Stop it as that user.") from None
    ended = select.poll()
    ended.register(process, select.POLLIN)
    with console.Progress(wait_for) as progress:
        while not ended.poll(POLL_INTERVAL * 1000):
            progress.update(_waiting_for() or wait_for)


def _waiting_for() -> str | None:
    """How many connections are open, in words; None if there are none or the API does not answer."""
    appliance = home.running()
    try:
        pools = Client(only_here=True).pools()["pools"] if appliance else []
        open_now = sum(int(pool["connections"]) for pool in pools)
    except (BkpoolError, KeyError, TypeError, ValueError):
        return None
    if not open_now:
        return None
    plural = "" if open_now == 1 else "s"
    return f"waiting for {open_now} open connection{plural}; Ctrl-C stops waiting, `bkpool down --now` closes them"
