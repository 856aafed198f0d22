"""Checks the settings and the home before anything is opened. It changes nothing."""

from __future__ import annotations

from pathlib import Path

from bkpool.appliance.run_options import ALL_ROLES, RunOptions
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.core.names import LOOPBACK
from bkpool.settings import Settings


def check_settings(options: RunOptions) -> None:
    """Checks that no bearer token crosses a network in clear unless the user asked for it.

    Raises:
        InvalidInput: The API would be served in clear beyond this machine, only one of its two certificate files is
            given, or the development issuer could be reached from another machine.
    """
    api = options.settings.api
    if (api.cert is None) != (api.key is None):
        given, missing = ("--api-cert", "--api-key") if api.cert else ("--api-key", "--api-cert")
        raise InvalidInput(f"{given}: {missing} is missing", hint="Give both files, or neither.", field=missing)
    host, _ = api.address
    if host not in LOOPBACK and options.api_scheme == "http" and not api.plain_http:
        raise InvalidInput(
            f"--api-address: other machines can reach {host}, and the API would be served in clear",
            hint="Add --api-tls (or --api-cert and --api-key), use 127.0.0.1, or add --plain-http.",
            field="--api-address",
        )
    if options.settings.dev_issuer.enabled:
        _check_dev_issuer(options.settings)


def _check_dev_issuer(settings: Settings) -> None:
    """Checks that only this machine reaches the development issuer: it makes a token for anybody.

    Raises:
        InvalidInput: Another machine could reach the issuer, or the API that trusts it.
    """
    for option, (host, _) in (
        ("--dev-issuer-address", settings.dev_issuer.address),
        ("--api-address", settings.api.address),
    ):
        if host not in LOOPBACK:
            raise InvalidInput(
                f"{option}: other machines can reach {host}, and the development issuer makes a token for anybody",
                hint="Use 127.0.0.1 for both addresses, or leave --dev-issuer out and configure a real issuer.",
                field=option,
            )
    if settings.dev_issuer.address[1] == 0:
        raise InvalidInput(
            "--dev-issuer-address: the port must not be 0",
            hint="Give a fixed port: it is part of the issuer's name in every token.",
            field="--dev-issuer-address",
        )
    if settings.appliance.roles != ALL_ROLES:
        raise InvalidInput(
            "--dev-issuer: cannot be used together with --roles",
            hint="Configure the cluster's own issuer, or another real one.",
            field="--dev-issuer",
        )


def check_home_complete(home: Path) -> None:
    """Checks that a home with leases still has the CA that signed their certificates.

    A new CA would silently invalidate all of them.

    Raises:
        HostFault: `pki/` is missing although there is a store.
    """
    if (home / "state.db").exists() and not (home / "pki").exists():
        raise HostFault(
            f"{home / 'pki'} is missing, and {home / 'state.db'} has leases that were signed with it",
            hint="Restore pki/ from a backup. If there is none: `bkpool down --purge` removes the leases too.",
            code="Unreadable",
        )
