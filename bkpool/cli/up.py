"""`bkpool up`: runs the appliance here, or with -d in the background, once per home.

The parent of a background appliance learns through a pipe that it is ready, or why it is not: cli/launch.py.
"""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from bkpool.cli import console, home, launch, options
from bkpool.core import durations
from bkpool.core.errors import BkpoolError, HostFault, InvalidInput

HIGHEST_PORT = 65535
_OPTIONS = {
    "pool_files": "--file",
    "backend": "--backend",
    "api_address": "--api-address",
    "gateway_address": "--gateway-address",
    "gateway_hosts": "--gateway-host",
    "metrics_address": "--metrics-address",
    "drain_timeout": "--drain-timeout",
}
"""Field of the appliance's Settings to option."""


def _timeout(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    return None if value is None else durations.parse(options.duration(ctx, param, value))


def _address(_ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """A callback of click for HOST:PORT; an IPv6 address stands in brackets."""
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    plain = bool(host) and (":" not in host or (host.startswith("[") and host.endswith("]")))
    if not plain or re.fullmatch("[0-9]{1,5}", port) is None or int(port) > HIGHEST_PORT:
        raise InvalidInput(
            f"{param.opts[0]}: {value[:80]!r} is not of the form HOST:PORT",
            hint="Write 127.0.0.1:8082, or [::1]:8082; port 0 takes a free one.",
            field=param.opts[0],
        )
    return host.strip("[]"), int(port)


@click.command(short_help="Start the appliance: controller, API and gateway.")
@click.option("-d", "--detach", is_flag=True, help="Run in the background; return when it is ready.")
@click.option(
    "-f",
    "--file",
    "pool_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A YAML file with pools (several documents allowed); repeatable. Without it there is one pool, `default`.",
)
@click.option("--backend", type=click.Choice(["auto", "process"]), help="What runs the workers.  [default: auto]")
@click.option("--api-address", metavar="HOST:PORT", callback=_address, help="[default: 127.0.0.1:8082]")
@click.option("--gateway-address", metavar="HOST:PORT", callback=_address, help="[default: port 1235]")
@click.option(
    "--gateway-host",
    "gateway_hosts",
    metavar="NAME",
    multiple=True,
    help="A further name of the gateway; repeatable.",
)
@click.option("--metrics-address", metavar="HOST:PORT", callback=_address, help="[default: 127.0.0.1:9090]")
@click.option(
    "--drain-timeout", metavar="DURATION", callback=_timeout, help="How long open builds may finish.  [default: 10m]"
)
@options.as_json
def command(detach: bool, as_json: bool, **given: Any) -> int:
    """Start the appliance on this machine.

    Started already it says so and is content. The first SIGTERM or Ctrl-C lets open builds finish, the second cuts
    them.
    """
    settings = {name: value for name, value in given.items() if value not in (None, (), "auto")}
    if files := settings.get("pool_files"):
        settings["pool_files"] = tuple(_readable(path) for path in files)
    if running := home.running():
        _answer(_same(running, settings), "bkpool is running already", as_json=as_json)
        return 0
    if detach:
        _answer(launch.detached(_arguments(settings)), "bkpool is up", as_json=as_json)
        return 0
    return _here(settings, as_json=as_json)


def _here(settings: dict[str, Any], *, as_json: bool) -> int:
    from bkpool.appliance import Settings, run  # noqa: PLC0415 - everything heavy hangs on it
    from bkpool.toolchain import default_cache  # noqa: PLC0415

    parent = launch.Parent.of_environment()

    def ready(told: dict[str, Any]) -> None:
        if parent is not None:
            parent.tell(told)
        elif "progress" in told:
            console.note(str(told["progress"]))
        else:
            _answer(told, "bkpool is up", as_json=as_json)

    try:
        return run(Settings(home=home.home(), cache=default_cache(), **settings), ready)
    except BkpoolError as error:
        if parent is not None:
            parent.failed(error)
        raise


def _same(running: home.Appliance, settings: dict[str, Any]) -> dict[str, Any]:
    """What runs, if it is what is asked for.

    Raises:
        HostFault: It runs with another backend or on other ports.
    """
    asked = (
        ("--backend", running.backend, settings.get("backend", running.backend) == running.backend),
        ("--api-address", running.api, _on_port(running.api, settings.get("api_address"))),
        ("--gateway-address", running.gateway, _on_port(running.gateway, settings.get("gateway_address"))),
    )
    for option, has, fits in asked:
        if not fits:
            raise HostFault(
                f"{option}: bkpool is running already (pid {running.pid}), with {has}",
                hint="Stop it with `bkpool down`, or set BKPOOL_HOME to start another one.",
                code="AlreadyRunning",
            )
    if settings.get("pool_files"):
        console.note("note: pool files are read at the start only: `bkpool down`, then `bkpool up -f` again.")
    return running.described


def _on_port(endpoint: str, address: tuple[str, int] | None) -> bool:
    return address is None or address[1] == 0 or endpoint.endswith(f":{address[1]}")


def _arguments(settings: dict[str, Any]) -> list[str]:
    """The command line that means these settings, for the appliance in the background."""
    return [
        part
        for name, value in settings.items()
        for one in (value if name in {"pool_files", "gateway_hosts"} else (value,))
        for part in (_OPTIONS[name], _text(one))
    ]


def _text(value: object) -> str:
    match value:
        case timedelta():
            return durations.render(value)
        case (str(host), int(port)):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case _:
            return str(value)


def _readable(path: Path) -> Path:
    try:
        with path.open("rb"):
            return path.absolute()
    except OSError as error:
        raise InvalidInput(
            f"--file: {path} cannot be read: {error.strerror}", hint="Correct the name.", field="--file"
        ) from None


def _answer(told: dict[str, Any], headline: str, *, as_json: bool) -> None:
    lines = [
        f"{headline} (backend {told.get('backend')}, pid {told.get('pid')})",
        f"  API      {told.get('apiEndpoint')}",
        f"  gateway  {told.get('gatewayEndpoint')}",
        f"  metrics  {told.get('metricsEndpoint')}",
    ]
    steps = ["", "next: bkpool build -t app:1 .", "      bkpool allocate", "stop: bkpool down"]
    console.answer(told, as_json=as_json, show=lambda: "\n".join(lines + steps))
    if not sys.stdout.isatty():
        console.note("\n".join(lines))
