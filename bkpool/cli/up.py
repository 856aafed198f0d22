"""`bkpool up`: runs the appliance here, or with -d in the background, once per home.

A pipe tells the parent of a background appliance that it is ready, or why it is not: cli/launch.py.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bkpool.cli import console, drain_view, home, launch, options, running_settings, up_options
from bkpool.core.errors import BkpoolError, HostFault
from bkpool.settings import files
from bkpool.settings.sources import ResolvedSettings, ValueSource

_AUTO = "auto"


@click.command(short_help="Start the appliance: controller, API and gateway.")
@click.option("-d", "--detach", is_flag=True, help="Run in the background; return when it is ready.")
@click.option(
    "-f",
    "--file",
    "pool_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A YAML file with pools; several documents are allowed. Repeatable. Without a file there is one pool, "
    "`default`. Files are not remembered.",
)
@click.option(
    "--backend",
    type=click.Choice([_AUTO, "process", "kind", "kubernetes"]),
    help="What runs the workers.  [default: the backend that this home was made with; for a new home kind where a "
    "container engine answers, else process]",
)
@up_options.setting_options
@options.as_json
def command(detach: bool, as_json: bool, pool_files: tuple[Path, ...], backend: str | None, **given: Any) -> int:
    """Start the appliance on this machine.

    If it is already running, this prints its addresses and exits 0. The first SIGTERM or Ctrl-C lets open builds
    finish; the second one closes their connections.

    The options are remembered for the next `up` of this home, except --file, --image-archive, --roles and --pool. A
    home keeps its backend until `down --purge`. Each setting can also be an environment variable or a line of
    config.toml: see `bkpool config`.
    """
    parent = launch.WaitingParent.of_environment()
    with launch.failures_sent_to(parent):
        return _up(given, pool_files, backend or _AUTO, parent, detach=detach, as_json=as_json)


def _up(
    given: dict[str, Any],
    pool_files: tuple[Path, ...],
    backend: str,
    parent: launch.WaitingParent | None,
    *,
    detach: bool,
    as_json: bool,
) -> int:
    resolved = up_options.load(given)
    pool_files = tuple(up_options.readable(path, "--file") for path in pool_files)
    if running := home.running():
        return _answer_running(running, resolved, backend, pool_files, as_json=as_json)
    if detach:
        _note_remembered(resolved)
        arguments = [part for path in pool_files for part in ("--file", str(path))]
        arguments += ["--backend", backend, *up_options.arguments(resolved.of(ValueSource.OPTION))]
        try:
            described = launch.detached(arguments, up_options.absolute_variables(resolved))
        except BkpoolError as error:
            # Another `up` of this home was faster.
            if error.code != "AlreadyRunning" or (running := launch.other_when_ready()) is None:
                raise
            return _answer_running(running, resolved, backend, pool_files, as_json=as_json)
        _answer(described, "bkpool is up", as_json=as_json)
        return 0
    return _run_here(resolved, backend, pool_files, parent, as_json=as_json)


def _answer_running(
    running: home.Appliance, resolved: ResolvedSettings, backend: str, pool_files: tuple[Path, ...], *, as_json: bool
) -> int:
    _check_stays(running)
    running_settings.check_same(running, resolved, backend)
    _answer(running.described, "bkpool is already running", as_json=as_json)
    if running.socket is None:
        console.note("note: an older bkpool started it; commands need `bkpool down`, then `bkpool up -d`.")
    if pool_files:
        console.note("note: pool files are read at the start only: `bkpool down`, then `bkpool up -f` again.")
    return 0


def _check_stays(running: home.Appliance) -> None:
    """Raises HostFault if the appliance is about to end: nobody can lease from it any more."""
    if (until := running.draining_until) is None:
        return
    seen = drain_view.look(until, datetime.now(UTC))
    if seen.lines:
        console.note("\n".join((seen.headline, *seen.lines)))
    latest = f"{until.astimezone():%H:%M:%S}"
    raise HostFault(
        f"bkpool is stopping (pid {running.pid}); its builds may go on until {latest}",
        hint="Run `bkpool down`, which waits until it has ended, and then `bkpool up` again.",
        code="AlreadyRunning",
    )


def _run_here(
    resolved: ResolvedSettings,
    backend: str,
    pool_files: tuple[Path, ...],
    parent: launch.WaitingParent | None,
    *,
    as_json: bool,
) -> int:
    from bkpool.appliance import RunOptions, run  # noqa: PLC0415 - it imports everything heavy
    from bkpool.toolchain import default_cache  # noqa: PLC0415

    if parent is None:
        _note_remembered(resolved)

    def report(message: dict[str, Any]) -> None:
        if "progress" not in message:
            _remember(message["pid"], resolved)
        if parent is not None:
            parent.send(message)
        elif "progress" in message:
            launch.show(progress, str(message["progress"]))
        else:
            starting.close()
            _answer(message, "bkpool is up", as_json=as_json)

    run_options = RunOptions(
        home=home.home(),
        cache=default_cache(),
        backend=backend,
        pool_files=pool_files,
        settings=resolved.settings,
        places=resolved.places,
    )
    with ExitStack() as starting:
        progress = starting.enter_context(console.Progress("starting")) if parent is None else None
        return run(run_options, report)


def _remember(pid: int, resolved: ResolvedSettings) -> None:
    """Keeps the options for the next `up`. The appliance is ready by now, so a full disk does not stop it."""
    try:
        running_settings.save(pid, resolved)
        files.remember(home.home(), resolved.of(ValueSource.OPTION))
    except BkpoolError as error:
        console.note(f"warning: the options are not remembered: {error.message}")


def _note_remembered(resolved: ResolvedSettings) -> None:
    if used := up_options.arguments(resolved.of(ValueSource.REMEMBERED)):
        console.note(f"remembered from an earlier up: {' '.join(used)} (`bkpool config unset --all` forgets)")


def _answer(described: dict[str, Any], headline: str, *, as_json: bool) -> None:
    lines = [
        f"{headline} (backend {described.get('backend')}, pid {described.get('pid')})",
        f"  API      {described.get('apiEndpoint')}",
        f"  gateway  {described.get('gatewayEndpoint')}",
        f"  metrics  {described.get('metricsEndpoint')}",
    ]
    if local := described.get("apiSocket"):
        lines.insert(2, f"  socket   {local} (for the commands of this machine)")
    if issuer := described.get("devIssuer"):
        lines.append(f"  issuer   {issuer} (for development: it makes a token for anyone who asks)")
    if missing := described.get("missingNetwork"):
        lines += [
            "",
            f"Workers have no network of their own, so only the admin is served: {missing['message']}",
            f"  {missing['hint']} Or accept that builds reach this machine: bkpool up --host-network",
        ]
    steps = ["", "next: bkpool build -t app:1 .", "      bkpool allocate", "stop: bkpool down"]
    console.answer(described, as_json=as_json, show=lambda: "\n".join(lines + steps))
    if not sys.stdout.isatty():
        console.note("\n".join(lines))
