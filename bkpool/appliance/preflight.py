"""Checks the settings and the home before anything is opened. It changes nothing."""

from __future__ import annotations

from pathlib import Path

from bkpool.appliance.addresses import check_distinct
from bkpool.appliance.run_options import ALL_ROLES, RunOptions
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.core.names import LOOPBACK
from bkpool.toolchain.doctor import worker_faults


def check_settings(options: RunOptions) -> None:
    """Checks that no bearer token crosses a network in clear unless the user asked for it, and that ports differ.

    Raises:
        InvalidInput: The API would be served in clear beyond this machine, only one of its two certificate files is
            given, the development issuer could be reached from another machine, or two servers have one address.
    """
    api = options.settings.api
    if (api.cert is None) != (api.key is None):
        given, missing = map(options.where, ("api.cert", "api.key") if api.cert else ("api.key", "api.cert"))
        raise InvalidInput(f"{given}: {missing} is missing", hint="Give both files, or neither.", field=missing)
    host, _ = api.address
    if host not in LOOPBACK and options.api_scheme == "http" and not api.plain_http:
        where = options.where("api.address")
        raise InvalidInput(
            f"{where}: other machines can reach {host}, and the API would be served in clear",
            hint="Add --api-tls (or --api-cert and --api-key), use 127.0.0.1, or add --plain-http.",
            field=where,
        )
    if options.settings.dev_issuer.enabled:
        _check_dev_issuer(options)
    check_distinct(options)


def _check_dev_issuer(options: RunOptions) -> None:
    """Checks that only this machine reaches the development issuer: it makes a token for anybody.

    Raises:
        InvalidInput: Another machine could reach the issuer, or the API that trusts it.
    """
    settings = options.settings
    address_from = options.where("dev_issuer.address")
    for where, (host, _) in (
        (address_from, settings.dev_issuer.address),
        (options.where("api.address"), settings.api.address),
    ):
        if host not in LOOPBACK:
            raise InvalidInput(
                f"{where}: other machines can reach {host}, and the development issuer makes a token for anybody",
                hint="Use 127.0.0.1 for both addresses, or leave --dev-issuer out and configure a real issuer.",
                field=where,
            )
    if settings.dev_issuer.address[1] == 0:
        raise InvalidInput(
            f"{address_from}: the port must not be 0",
            hint="Give a fixed port: it is part of the issuer's name in every token.",
            field=address_from,
        )
    if settings.appliance.roles != ALL_ROLES:
        where = options.where("dev_issuer.enabled")
        raise InvalidInput(
            f"{where}: cannot be used together with {options.where('appliance.roles')}",
            hint="Configure the cluster's own issuer, or another real one.",
            field=where,
        )


def check_workers_can_start(options: RunOptions) -> None:
    """Checks what every worker process needs of this machine and user.

    Raises:
        HostFault: `NoWorker`: none could start; with the first reason, and how many more there are.
    """
    faults = worker_faults(options.home, host_network=options.settings.workers.host_network)
    if faults:
        first, more = faults[0], f" (and {len(faults) - 1} more: see `bkpool doctor`)" if faults[1:] else ""
        raise HostFault(
            f"no worker could start on this machine: {first.name}: {first.detail}{more}",
            hint=first.fix,
            code="NoWorker",
        )


def check_home_complete(home: Path) -> None:
    """Checks that a home with leases still has the CA that signed their certificates.

    A new CA would silently invalidate all of them.

    Raises:
        HostFault: `pki/` is missing although there is a store.
    """
    if (home / "state.db").exists() and not any((home / name).exists() for name in ("pki", "pki.rotating")):
        raise HostFault(
            f"{home / 'pki'} is missing, and {home / 'state.db'} has leases that were signed with it",
            hint="Restore pki/ from a backup. If there is none: `bkpool down --purge` removes the leases too.",
            code="Unreadable",
        )
