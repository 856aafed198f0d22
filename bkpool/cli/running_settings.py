"""The settings that the running appliance uses, and whether a second `up` asks for others.

`up` writes them to `running.json` when the appliance is ready. It changes nothing in an appliance that runs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bkpool.cli import home
from bkpool.core import durations
from bkpool.core.descriptors import ConnectionShares
from bkpool.core.errors import HostFault
from bkpool.core.names import GATEWAY_PORT
from bkpool.home.files import write_private
from bkpool.settings import files
from bkpool.settings.catalogue import Setting
from bkpool.settings.kinds import ADDRESS, Address
from bkpool.settings.sources import ResolvedSettings, ValueSource

_FILE = "running.json"
_ENDPOINTS = {
    "api.address": "apiEndpoint",
    "gateway.address": "gatewayEndpoint",
    "metrics.address": "metricsEndpoint",
    "dev_issuer.address": "devIssuer",
}
"""Setting to the field of `appliance.json` that has the port, also where the setting is port 0."""


def save(pid: int, resolved: ResolvedSettings) -> None:
    """Writes the settings of the appliance with this pid.

    Raises:
        HostFault: The file cannot be written.
    """
    used = {one.setting.name: one.text for one in resolved.values}
    write_private(home.home() / _FILE, json.dumps({"pid": pid, "settings": used}).encode())


def drain_timeout(pid: int) -> float:
    """Seconds that the appliance with this pid gives its builds when it ends."""
    return durations.parse(_used(pid)["appliance.drain_timeout"] or "10m").total_seconds()


def host_network(pid: int) -> bool:
    """Whether the worker processes of the appliance with this pid use the network of the machine."""
    return _used(pid)["workers.host_network"] == "true"


def connections(pid: int) -> ConnectionShares:
    """How many connections the settings of the appliance with this pid allow."""
    used = _used(pid)
    names = {
        "api": "api.connections",
        "gateway_pending": "gateway.pending_connections",
        "gateway": "gateway.connections",
    }
    return ConnectionShares(**{field: int(used[name] or 0) for field, name in names.items()})


def check_same(running: home.Appliance, resolved: ResolvedSettings, backend: str) -> None:
    """Checks that the running appliance uses the given backend, options and environment variables.

    Args:
        running: The appliance.
        resolved: The settings of this `up`.
        backend: The backend of this `up`; `auto` is the same as any.

    Raises:
        HostFault: `AlreadyRunning`: It uses another backend, or another value of a setting.
    """
    if backend not in {"auto", running.backend}:
        raise _differs("--backend", running, running.backend)
    used = _used(running.pid)
    for one in resolved.of(ValueSource.OPTION, ValueSource.ENVIRONMENT):
        if one.setting.kind is ADDRESS:
            same = _same_address(one.setting.name, one.value, used, running)
        else:
            # A certificate of the user's also makes the API use TLS.
            tls = one.setting.name == "api.tls" and one.value and running.api.startswith("https")
            same = tls or one.text == used[one.setting.name]
        if not same:
            raise _differs(one.where, running, _shown(one.setting, used, running))


def _used(pid: int) -> dict[str, str]:
    """Name of each setting to its text, as this appliance uses it."""
    # Without the file of this appliance, the files and the environment of this `up` are the best that is known.
    known = {one.setting.name: one.text for one in files.load(home.home(), os.environ, {}, Path.cwd()).values}
    try:
        written = json.loads((home.home() / _FILE).read_bytes())
        return known | (written["settings"] if written["pid"] == pid else {})
    except (OSError, ValueError, KeyError, TypeError):
        return known


def _same_address(name: str, asked: Address | None, used: dict[str, str], running: home.Appliance) -> bool:
    endpoint = running.described.get(_ENDPOINTS[name])
    if asked is None or endpoint is None:
        return asked is None or str(asked) == used[name]
    host = used[name].rpartition(":")[0].strip("[]")
    if not host:  # only gateway.address has no default
        host = "0.0.0.0" if used["gateway.hosts"] else "127.0.0.1"  # noqa: S104 - compared, not opened
    port = urlsplit(endpoint).port or GATEWAY_PORT
    return asked.host == host and asked.port in {0, port}


def _shown(setting: Setting, used: dict[str, str], running: home.Appliance) -> str:
    if used[setting.name]:
        return f"{setting.name} {used[setting.name]}"
    endpoint: Any = running.described.get(_ENDPOINTS.get(setting.name, ""))
    return str(endpoint or f"{setting.name} {setting.default_text or 'not set'}")


def _differs(where: str, running: home.Appliance, used: str) -> HostFault:
    return HostFault(
        f"{where}: bkpool is already running (pid {running.pid}), with {used}",
        hint="Run `bkpool down` first, or set BKPOOL_HOME to start another one.",
        code="AlreadyRunning",
    )
