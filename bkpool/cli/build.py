"""`bkpool build`: a lease, a private builder, `buildx build` on it, and nothing left behind.

buildx has the terminal, the signals and the exit code. bkpool does only what comes before and after. The lease's
token is in no command line and in no file.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from threading import Event, Thread
from typing import Any

import click

from bkpool.cli import console, options, refused_ports
from bkpool.cli import lease as leases
from bkpool.cli.child import Child
from bkpool.cli.client import Client
from bkpool.cli.private_directory import private_directory
from bkpool.cli.signals import Signals, typed_at_terminal
from bkpool.core import durations
from bkpool.core.errors import BkpoolError, Forbidden, Gone, HostFault, InvalidInput, NotFound, Unauthenticated
from bkpool.core.names import DEFAULT_POOL, END_WHEN_UNUSED

BUILDER = "bkpool"
MIN_RENEW_INTERVAL = 0.5
"""Seconds between two renewals at least, however short the lease is."""


class SplittingCommand(click.Command):
    """Takes the options of `bkpool build` from anywhere before `--`; buildx gets all others unchanged.

    click itself would also find `-p` in `-tpool`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the options of this command; those of buildx are left in `ctx.obj`."""
        takes_value = {name: not option.is_flag for option in self._options(ctx) for name in option.opts}
        ours: list[str] = []
        for_buildx: list[str] = []
        rest = iter(args)
        for arg in rest:
            name, equals, _ = arg.partition("=")
            if arg == "--":
                for_buildx += rest
            elif name in takes_value and (name.startswith("--") or not equals):
                ours.append(arg)
                if takes_value[name] and not equals:
                    ours += [value for value in [next(rest, None)] if value is not None]
            else:
                for_buildx.append(arg)
        ctx.obj = for_buildx
        return super().parse_args(ctx, ours)

    def _options(self, ctx: click.Context) -> Iterator[click.Option]:
        return (param for param in self.get_params(ctx) if isinstance(param, click.Option))


@click.command(
    cls=SplittingCommand,
    short_help="Lease a worker, run `buildx build` on it, release it.",
    options_metavar="[OPTIONS] [--] BUILDX-ARGUMENTS...",
)
@click.option("-p", "--pool", default=DEFAULT_POOL, show_default=True, help="The pool of the worker.")
@options.namespace
@click.option(
    "--ttl",
    default="10m",
    show_default=True,
    callback=options.duration,
    help="How long the lease remains without a renewal; bkpool renews it while running. If bkpool is killed, the "
    "lease ends a minute after its last connection.",
)
@options.wait
@options.older_identity
@click.pass_obj
def command(args: list[str], /, *, pool: str, namespace: str, ttl: str, wait: str | None) -> int:
    """Lease a worker, run `buildx build` on it with these arguments, and release it.

    \b
    bkpool build -t app:1 .
    bkpool build --pool arm -- --push -t registry.example/app:1 .

    The exit code is that of buildx. buildx uses the registry logins of docker (DOCKER_CONFIG).
    """
    if any(arg == "--builder" or arg.startswith("--builder=") for arg in args):
        raise InvalidInput(
            "--builder: the builder is the leased worker",
            hint="Leave this option out, or use `docker buildx build` with your own builder.",
            field="--builder",
        )
    from bkpool.cli import tools  # noqa: PLC0415 - only after the arguments were checked
    from bkpool.toolchain import Tool  # noqa: PLC0415

    buildx = str(tools.ensure([Tool.BUILDX])[Tool.BUILDX])
    request: dict[str, Any] = {"poolName": pool, "namespace": namespace, "ttl": ttl, "wait": wait}
    # Nobody else has the key, so nobody else can use the lease.
    request |= {"jobId": uuid.uuid4().hex, "metadata": {END_WHEN_UNUSED: "true"}}
    with Signals() as signals, _leased(Client(claims=options.claims()), request, signals) as lease:
        if lease is not None:
            with _builder(buildx, lease, signals) as environment:
                code = _run([buildx, "build", "--builder", BUILDER, *args], environment, signals)
                if code and signals.received is None:
                    refused_ports.explain(buildx, BUILDER, environment)
                return code
    return 128 + (signals.received or 0)


@contextmanager
def _leased(client: Client, request: dict[str, Any], signals: Signals) -> Iterator[dict[str, Any] | None]:
    """A lease that is renewed until the end of the block and then released; None if a signal arrived first."""
    lease = leases.allocate(client, request, signals)
    if lease is None:
        yield None
        return
    released = Event()
    renewing = copy(client)  # a client remembers its call, for the handler of a signal
    Thread(target=_renew_until, args=(released, renewing, lease["token"], request["ttl"]), daemon=True).start()
    try:
        yield lease
    finally:
        released.set()
        leases.release(client, lease["token"])


def _renew_until(released: Event, client: Client, token: str, ttl: str) -> None:
    pause = half = max(durations.parse(ttl).total_seconds() / 2, MIN_RENEW_INTERVAL)
    while not released.wait(pause):
        try:
            client.renew(token, ttl)
            pause = half
        except (Gone, NotFound, Unauthenticated) as error:
            if not released.is_set():
                console.note(f"warning: the lease is lost: {error.message}")
            return
        except Forbidden as error:
            console.note(f"warning: {error.message}")
            return
        except BkpoolError:
            pause = half / 4  # three more attempts before the lease expires


@contextmanager
def _builder(buildx: str, lease: dict[str, Any], signals: Signals) -> Iterator[dict[str, str]]:
    """A builder for the lease in a private configuration. Yields the environment in which buildx finds it."""
    with private_directory("bkpool-private-") as directory:
        leases.save(lease, directory, token=False)
        environment = os.environ | {"BUILDX_CONFIG": str(directory / "buildx")}
        _create([buildx, *leases.create_arguments(lease, directory, BUILDER)], environment, signals)
        yield environment


def _create(command: list[str], environment: dict[str, str], signals: Signals) -> None:
    with tempfile.TemporaryFile() as errors:
        try:
            child = Child(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            )
        except OSError as error:
            raise HostFault(
                f"{command[0]} cannot be run: {error.strerror}", hint="`bkpool doctor` checks buildx."
            ) from None
        code = _wait(child, signals)
        errors.seek(0)
        written = errors.read().decode(errors="replace").strip()
    if code and signals.received is None:
        reason = (written or f"exit code {code}").splitlines()[-1]
        raise HostFault(f"buildx could not create a builder: {reason}", hint="`bkpool doctor` checks buildx.")


def _run(command: list[str], environment: dict[str, str], signals: Signals) -> int:
    if signals.received is not None:
        return 128 + signals.received
    code = _wait(Child(command, env=environment), signals)
    return 128 - code if code < 0 else code


def _wait(child: subprocess.Popen[bytes], signals: Signals) -> int:
    """Waits until a child has ended, and passes each signal on to it. Returns its exit code."""
    with child:
        signals.act(_pass_on_to(child))
        # The child stays a zombie, so no signal goes to another process that got the same number.
        with suppress(ChildProcessError):  # where SIGCHLD is ignored, no zombie is left
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        signals.act(None)
        return child.wait()


def _pass_on_to(child: subprocess.Popen[bytes]) -> Callable[[int], None]:
    def send(number: int) -> None:
        if not typed_at_terminal(number):
            child.send_signal(number)

    return send
