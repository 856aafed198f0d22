"""Where bkpool keeps its state on this machine, and which appliance runs from there.

It only reads, and imports nothing heavy: every command uses it first.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.home.files import as_host_fault
from bkpool.home.lock import holder


def home() -> Path:
    """The directory of the state: $BKPOOL_HOME, else `bkpool` in the XDG state directory. The path is absolute.

    Raises:
        InvalidInput: BKPOOL_HOME names something that is not a directory.
    """
    if given := os.environ.get("BKPOOL_HOME"):
        path = Path(given).absolute()
        if os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112 - Path.exists raises without rights
            raise InvalidInput(
                f"BKPOOL_HOME: {path} is not a directory",
                hint="Set BKPOOL_HOME to a directory, or to a path that does not exist yet.",
                field="BKPOOL_HOME",
            )
        return path
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG base directory specification: a relative path is invalid and is ignored.
    return (Path(state) if state.startswith("/") else Path.home() / ".local" / "state") / "bkpool"


@dataclass(frozen=True, slots=True)
class Appliance:
    """The appliance that runs from this home, as it described itself in `appliance.json` when it was ready."""

    pid: int
    api: str
    gateway: str
    backend: str
    described: dict[str, Any]

    @property
    def dev_issuer(self) -> str | None:
        """The URL of its development issuer, where it runs one."""
        return self.described.get("devIssuer")

    @property
    def socket(self) -> Path | None:
        """Its Unix socket for the commands of this machine; None if an older version started it."""
        path = self.described.get("apiSocket")
        return Path(path) if isinstance(path, str) and path.startswith("/") else None

    @property
    def tells_drain(self) -> bool:
        """Whether it says in `appliance.json` that it drains. Earlier versions do not."""
        return "draining" in self.described

    @property
    def draining_until(self) -> datetime | None:
        """When it cuts the builds that it waits for; None while it does not drain."""
        try:
            return datetime.fromisoformat(self.described["draining"]["until"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def ports_by_purpose(self) -> dict[str, int]:
        """The TCP ports that it listens on."""
        others = {"metrics": "metricsEndpoint", "development issuer": "devIssuer"}
        urls = {"API": self.api, "gateway": self.gateway}
        urls |= {purpose: str(self.described.get(name, "")) for purpose, name in others.items()}
        return {purpose: port for purpose, url in urls.items() if (port := urlsplit(url).port)}

    @property
    def ports(self) -> frozenset[int]:
        """The same, without their purposes."""
        return frozenset(self.ports_by_purpose.values())


def fault_at_home(error: OSError) -> HostFault | None:
    """The sentence for an error at the home, such as that of another user; None if it is about something else."""
    if not isinstance(error.filename, str | bytes):
        return None
    path, directory = Path(os.fsdecode(error.filename)).absolute(), home()
    if path != directory and directory not in path.parents and path not in directory.parents:
        return None
    try:
        with as_host_fault(path):
            raise error
    except HostFault as fault:
        return fault


def running() -> Appliance | None:
    """The appliance of this home; None if there is none, or it is not ready yet, or it was killed.

    Raises:
        HostFault: `Permission`: this user may not read the home.
    """
    try:
        described = json.loads((home() / "appliance.json").read_bytes())
        found = Appliance(
            int(described["pid"]),
            _reachable(described["apiEndpoint"]),
            described["gatewayEndpoint"],
            described["backend"],
            described,
        )
    except PermissionError:
        with as_host_fault(home() / "appliance.json"):
            raise
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if holder(home()) == found.pid else None


def _reachable(endpoint: str) -> str:
    """The endpoint with an address that can be dialled, where it listens on every interface."""
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def admin_token() -> str | None:
    """The local admin's bearer token, where this user may read it."""
    try:
        return (home() / "admin.token").read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None
