"""The command line: `bkpool`, and `bkctl`, its older name.

Each command is a module that is imported only when the command runs, so that a command in a script starts fast.
Nothing heavier than click is imported here.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from bkpool import __version__

COMMANDS = {
    "up": "Start the appliance: controller, API and gateway.",
    "down": "Stop the appliance; open builds may finish first.",
    "status": "Show the pools, or one pool with its workers.",
    "build": "Lease a worker, run `buildx build` on it, release it.",
    "allocate": "Lease a worker and get the certificates for it.",
    "renew": "Extend a lease.",
    "release": "End a lease and give its worker back.",
    "revoke": "End leases and cut their builds.",
    "pool": "Delete a pool.",
    "config": "Show the settings of `up` and where each comes from.",
    "logs": "Show the log of the appliance or of a worker.",
    "kubeconfig": "Show how kubectl reaches the cluster of this home.",
    "manifests": "Print the manifests of an appliance in a cluster.",
    "pki": "Show or replace the certificate authority.",
    "toolchain": "Get the tools that bkpool runs, and show where they are.",
    "doctor": "Check whether this machine has what bkpool needs.",
    "version": "Show the version.",
    "auth": "Explain who may use a pool, and which issuers are trusted.",
    "oidc-token": "Get a token from the development issuer.",
}
"""Every command with its summary, in the order of the help. The module has the same name and a click `command`."""


_HELP = """A pool of BuildKit workers for docker buildx.

\b
bkpool up -d                       start it on this machine
bkpool build -t app:1 .            build on a leased worker
bkpool down                        stop it

Environment: BKCTL_ENDPOINT (default: the appliance running here, else http://localhost:8082), BKCTL_TOKEN,
BKCTL_TOKEN_FILE, BKCTL_AUDIENCE, BKCTL_OIDC_ISSUER, BKCTL_NAMESPACE, BKCTL_GATEWAY_ENDPOINT, BKCTL_TLS_CA_CERT,
BKCTL_TLS_SKIP_VERIFY, BKPOOL_LEASE_TOKEN, BKPOOL_HOME, BKPOOL_CACHE. In GitHub Actions, GitLab CI and pods, bkpool
finds the token of the platform. `bkpool config` lists the variables that set up an appliance.
"""  # \b keeps click from filling the paragraph


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names, in the order of the help."""
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command; for a mistyped one, the error has the nearest name."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches  # noqa: PLC0415 - only for an error

            from bkpool.core.errors import InvalidInput  # noqa: PLC0415 - as above

            close = get_close_matches(args[0], COMMANDS, n=1)
            raise InvalidInput(
                f"there is no command {args[0][:80]!r}",
                hint=f"Did you mean {close[0]}?" if close else f"See `{ctx.command_path} --help`.",
            )
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Imports a command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"bkpool.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        """Writes the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def program() -> None:
    """The program. Its help is _HELP."""


def main() -> NoReturn:
    """Runs the program under the name with which it was called, and ends the process with its exit code."""
    from bkpool.cli.errors import guarded  # noqa: PLC0415 - importing `COMMANDS` does not need it
    from bkpool.cli.signals import WaitInterrupter  # noqa: PLC0415 - as above

    def run() -> object:
        with WaitInterrupter():
            return program.main(prog_name=name, standalone_mode=False)

    called = Path(sys.argv[0]).name
    name = "bkpool" if called == "__main__.py" else called
    sys.exit(guarded(run, name))
