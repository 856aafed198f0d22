"""`bkpool doctor`: checks this machine, with one line for each check and a fix for each failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bkpool.cli import console, home, options, running_settings
from bkpool.cli.client import Client
from bkpool.core.descriptors import ConnectionShares
from bkpool.core.errors import BkpoolError
from bkpool.core.names import GATEWAY_PORT

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bkpool.settings import Settings
    from bkpool.toolchain.doctor import Check, DescriptorLoad

_ANSWER_TIMEOUT = 5.0  # seconds: a machine is checked also where the appliance hangs
_MARKS = {True: ("✓", "green"), None: ("!", "yellow"), False: ("✗", "red")}


@click.command(short_help="Check whether this machine has what bkpool needs.")
@options.as_json
def command(as_json: bool) -> int:
    """Check whether this machine has what bkpool needs.

    It judges the appliance that runs from this home, with the settings that it has; if none runs, what `up` would
    start. It changes nothing. The exit code is 1 if a check failed.
    """
    from bkpool.cli import tools  # noqa: PLC0415 - the toolchain is slow to import
    from bkpool.toolchain import Toolchain, default_cache, doctor  # noqa: PLC0415

    tools.quiet_logging()
    check, settings = _check_settings()
    appliance = _running()
    with console.Progress("checking this machine"):
        found = [
            check,
            *doctor.checks(
                home.home(),
                Toolchain(default_cache()),
                appliance.ports_by_purpose if appliance else _ports(settings),
                own_ports=appliance.ports if appliance else frozenset(),
                host_network=running_settings.host_network(appliance.pid)
                if appliance
                else settings.workers.host_network,
                load=_load(appliance, settings),
            ),
        ]
    failed = any(check.ok is False for check in found)
    answer: dict[str, Any] = {"ok": not failed, "checks": [dataclasses.asdict(check) for check in found]}
    console.answer(answer, as_json=as_json, show=lambda: _table(found))
    return int(failed)


def _running() -> home.Appliance | None:
    """The appliance to judge; None: judge what `up` would start. Another check reports an unreadable home."""
    try:
        return home.running()
    except BkpoolError:
        return None


def _load(appliance: home.Appliance | None, settings: Settings) -> DescriptorLoad:
    """What shares the open files of the appliance that runs, or of the one that `up` would start."""
    from bkpool.toolchain.doctor import DescriptorLoad  # noqa: PLC0415

    if appliance is None:
        api, gateway = settings.api, settings.gateway
        wanted = ConnectionShares(api.connections, gateway.pending_connections, gateway.connections)
        return DescriptorLoad(wanted)
    return DescriptorLoad(
        running_settings.connections(appliance.pid), _most_workers(appliance), _limit(appliance.pid)
    )


def _most_workers(appliance: home.Appliance) -> int:
    """How many worker processes the pools may have together; 0 if that cannot be asked, or workers are pods."""
    if appliance.backend != "process":
        return 0
    try:
        pools = Client(only_here=True, answer_timeout=_ANSWER_TIMEOUT).pools()["pools"]
        return sum(int(pool["max"]) for pool in pools)
    except (BkpoolError, KeyError, TypeError, ValueError):
        return 0


def _limit(pid: int) -> int:
    """How many files the process may open; 0 if that cannot be read, as for another user's."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        found = next(line for line in lines if line.startswith("Max open files")).split()[3]
        return 0 if found == "unlimited" else int(found)
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def _check_settings() -> tuple[Check, Settings]:
    """A finding about the settings, and the settings; the defaults if they are at fault."""
    from bkpool.cli import up_options  # noqa: PLC0415 - the settings are slow to import
    from bkpool.settings import Settings  # noqa: PLC0415
    from bkpool.toolchain.host import Check  # noqa: PLC0415

    try:
        return Check("settings", True, "`bkpool config` shows them"), up_options.load({}).settings
    except BkpoolError as error:
        return Check("settings", False, error.message, error.hint), Settings()


def _ports(settings: Settings) -> dict[str, int]:
    """The ports that the appliance needs with these settings, by their purpose."""
    ports = {
        "API": settings.api.address.port,
        "gateway": settings.gateway.address.port if settings.gateway.address else GATEWAY_PORT,
        "metrics": settings.metrics.address.port,
        **({"development issuer": settings.dev_issuer.address.port} if settings.dev_issuer.enabled else {}),
    }
    return {purpose: port for purpose, port in ports.items() if port}


def _table(checks: Iterable[Check]) -> RenderableType:
    from rich.table import Table  # noqa: PLC0415 - on a terminal only
    from rich.text import Text  # noqa: PLC0415

    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.ok]
        table.add_row(Text(mark, style=style), Text(check.name), Text(check.detail))
        if check.fix:
            table.add_row("", "", Text(f"→ {check.fix}", style="bold"))
    return table
