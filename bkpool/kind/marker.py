"""What a home stores about its kind cluster: `kind.json`, and the path of its kubeconfig."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bkpool.home.files import unreadable, write_private

_FILE = "kind.json"


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of `kind.json`."""

    name: str
    """The cluster's name."""
    state: Literal["creating", "ready"]
    made: bool
    """Whether this home created the cluster; an adopted cluster is never deleted."""

    @staticmethod
    def read(home: Path) -> Marker | None:
        """The marker of a home; None if it has no cluster.

        Raises:
            HostFault: `Unreadable`: the file is damaged.
        """
        path = home / _FILE
        try:
            return Marker(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise unreadable(
                path, "is damaged", hint="Remove it: a cluster of that name is then adopted, not deleted."
            ) from None

    def write(self, home: Path) -> None:
        """Stores the marker durably.

        Raises:
            HostFault: `DiskFull`, `Permission`, or another error of the system.
        """
        write_private(home / _FILE, json.dumps(asdict(self)).encode())

    @staticmethod
    def remove(home: Path) -> None:
        """Removes the marker if there is one."""
        (home / _FILE).unlink(missing_ok=True)


def kubeconfig_of(home: Path) -> Path:
    """Where a home stores the kubeconfig of its cluster."""
    return home / "kubeconfig"
