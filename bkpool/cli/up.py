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
from bkpool.core.names import Key

HIGHEST_PORT = 65535
_OPTIONS = {
    "pool_files": "--file",
    "backend": "--backend",
    "api_address": "--api-address",
    "gateway_address": "--gateway-address",
    "gateway_hosts": "--gateway-host",
    "metrics_address": "--metrics-address",
    "drain_timeout": "--drain-timeout",
    "plain_http": "--plain-http",
    "api_tls": "--api-tls",
    "api_cert": "--api-cert",
    "api_key": "--api-key",
    "dev_issuer": "--dev-issuer",
    "dev_issuer_address": "--dev-issuer-address",
    "cluster": "--cluster",
    "node_image": "--node-image",
    "buildkit_image": "--buildkit-image",
    "image_archives": "--image-archive",
    "kubeconfig": "--kubeconfig",
    "context": "--context",
    "namespace": "--namespace",
    "roles": "--roles",
    "pool": "--pool",
    "pool_namespaces": "--pool-namespace",
    "image": "--image",
}
"""Field of the appliance's Settings to option."""
_FILE = click.Path(path_type=Path)


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


def _roles(_ctx: click.Context, param: click.Parameter, value: str | None) -> frozenset[str] | None:
    """A callback of click for a list of roles."""
    if value is None:
        return None
    roles = frozenset(value.split(","))
    if not roles <= {"api", "controller", "gateway"}:
        raise InvalidInput(
            f"{param.opts[0]}: {value[:80]!r} is no list of roles",
            hint="Write one or more of api, controller and gateway, with commas between them.",
            field=param.opts[0],
        )
    return roles


def _pool(_ctx: click.Context, param: click.Parameter, value: str | None) -> Key | None:
    """A callback of click for NAMESPACE/NAME."""
    if value is None:
        return None
    namespace, slash, name = value.partition("/")
    if not slash or not namespace or not name or "/" in name:
        raise InvalidInput(
            f"{param.opts[0]}: {value[:80]!r} is not of the form NAMESPACE/NAME",
            hint="Write default/my-pool.",
            field=param.opts[0],
        )
    return Key(namespace, name)


@click.command(short_help="Start the appliance: controller, API and gateway.")
@click.option("-d", "--detach", is_flag=True, help="Run in the background; return when it is ready.")
@click.option(
    "-f",
    "--file",
    "pool_files",
    multiple=True,
    type=_FILE,
    help="A YAML file with pools (several documents allowed); repeatable. Without it there is one pool, `default`.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "process", "kind", "kubernetes"]),
    help="What runs the workers.  [default: what this home was made with; else kind where a container engine "
    "answers, else process]",
)
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
@click.option("--cluster", metavar="NAME", help="kind: the cluster's name.  [default: bkpool]")
@click.option("--node-image", metavar="IMAGE", help="kind: the image of its node.  [default: the one of this kind]")
@click.option("--buildkit-image", metavar="IMAGE", help="Pods: the image of workers, where a pool names none.")
@click.option(
    "--image-archive",
    "image_archives",
    multiple=True,
    type=_FILE,
    help="kind: a `docker save` archive to load into it, where nothing can be pulled; repeatable.",
)
@click.option("--kubeconfig", type=_FILE, help="kubernetes: the file.  [default: as kubectl]")
@click.option("--context", metavar="NAME", help="kubernetes: the context in it.  [default: its current one]")
@click.option(
    "--namespace", metavar="NAME", help="Of the appliance itself, in a cluster.  [default: buildkit-system]"
)
@click.option("--roles", callback=_roles, metavar="LIST", help="In a cluster: api,controller or gateway.")
@click.option("--pool", callback=_pool, metavar="NAMESPACE/NAME", help="The pool of a gateway that runs alone.")
@click.option(
    "--pool-namespace",
    "pool_namespaces",
    metavar="NAME",
    multiple=True,
    help="In a cluster: where pools may be; repeatable.  [default: everywhere]",
)
@click.option("--image", metavar="IMAGE", help="In a cluster: bkpool's own, for the gateways.")
@click.option("--plain-http", is_flag=True, help="Serve the API in clear beyond this machine too.")
@click.option("--api-tls", is_flag=True, help="Serve the API over TLS, certified by bkpool's own CA.")
@click.option("--api-cert", type=_FILE, help="Serve it over TLS with this certificate (PEM, with its chain).")
@click.option("--api-key", type=_FILE, help="The key of --api-cert (PEM).")
@click.option(
    "--dev-issuer", is_flag=True, help="Also run an issuer that makes tokens for whoever asks: for trying things out."
)
@click.option("--dev-issuer-address", metavar="HOST:PORT", callback=_address, help="[default: 127.0.0.1:8888]")
@options.as_json
def command(detach: bool, as_json: bool, **given: Any) -> int:
    """Start the appliance on this machine.

    Started already it says so and is content. The first SIGTERM or Ctrl-C lets open builds finish, the second cuts
    them.
    """
    settings = {name: value for name, value in given.items() if value not in (None, (), "auto", False)}
    for name in ("pool_files", "image_archives"):
        if files := settings.get(name):
            settings[name] = tuple(_readable(path, _OPTIONS[name]) for path in files)
    for name in ("kubeconfig", "api_cert", "api_key"):
        if name in settings:
            settings[name] = _readable(settings[name], _OPTIONS[name])
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
        ("--api-tls", running.api, not {"api_tls", "api_cert"} & settings.keys() or running.api.startswith("https")),
        ("--dev-issuer", "no development issuer", not settings.get("dev_issuer") or running.dev_issuer is not None),
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


_REPEATED = {"pool_files", "gateway_hosts", "image_archives", "pool_namespaces"}


def _arguments(settings: dict[str, Any]) -> list[str]:
    """The command line that means these settings, for the appliance in the background."""
    return [
        part
        for name, value in settings.items()
        for one in (value if isinstance(value, tuple) and name in _REPEATED else (value,))
        for part in ((_OPTIONS[name],) if one is True else (_OPTIONS[name], _text(one)))
    ]


def _text(value: object) -> str:
    match value:
        case timedelta():
            return durations.render(value)
        case frozenset():
            return ",".join(sorted(value))
        case Key():
            return str(value)
        case (str(host), int(port)):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case _:
            return str(value)


def _readable(path: Path, option: str) -> Path:
    try:
        with path.open("rb"):
            return path.absolute()
    except OSError as error:
        raise InvalidInput(
            f"{option}: {path} cannot be read: {error.strerror}", hint="Correct the name.", field=option
        ) from None


def _answer(told: dict[str, Any], headline: str, *, as_json: bool) -> None:
    lines = [
        f"{headline} (backend {told.get('backend')}, pid {told.get('pid')})",
        f"  API      {told.get('apiEndpoint')}",
        f"  gateway  {told.get('gatewayEndpoint')}",
        f"  metrics  {told.get('metricsEndpoint')}",
    ]
    if issuer := told.get("devIssuer"):
        lines.append(f"  issuer   {issuer} (for development: a token for whoever asks)")
    steps = ["", "next: bkpool build -t app:1 .", "      bkpool allocate", "stop: bkpool down"]
    console.answer(told, as_json=as_json, show=lambda: "\n".join(lines + steps))
    if not sys.stdout.isatty():
        console.note("\n".join(lines))
