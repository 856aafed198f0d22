"""Finds the programs that give a worker process its network. They are packages of the system, in a few lines of C.

Nothing here gets or starts them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from bkpool.core.errors import HostFault

PACKAGES = {"pasta": "passt", "nft": "nftables"}  # the same names in Debian, Ubuntu, Fedora, Alpine and Arch Linux
# Users often have no sbin in their PATH.
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TUN = Path("/dev/net/tun")


@dataclass(frozen=True, slots=True)
class NetworkPrograms:
    """The programs that make the network of a worker, as absolute paths."""

    pasta: Path
    """Connects a network namespace with the host, without any right on the host's own network."""
    nft: Path
    """Gives the packet filter to the kernel."""

    @classmethod
    def find(cls, search_path: str, tun: Path = _TUN) -> NetworkPrograms:
        """The programs of this machine.

        Args:
            search_path: The operator's own PATH; the directories of the system are searched too.
            tun: The device that pasta needs.

        Raises:
            HostFault: A program is missing, or this user may not open the device.
        """
        search = os.pathsep.join((search_path, _SYSTEM_PATH))
        found = {name: shutil.which(name, path=search) for name in PACKAGES}
        if missing := [name for name, path in found.items() if path is None]:
            packages = " ".join(PACKAGES[name] for name in missing)
            raise HostFault(
                f"a worker needs {' and '.join(missing)} for a network of its own; this machine does not have "
                f"{'them' if len(missing) > 1 else 'it'}",
                hint=f"Install {packages}, for example with `apt-get install {packages}` as root.",
                code="ToolMissing",
            )
        if not os.access(tun, os.R_OK | os.W_OK):
            there = tun.exists()
            raise HostFault(
                f"{f'this user may not open {tun}' if there else f'there is no {tun}'}, and a worker needs it for a "
                "network of its own",
                hint=f"Run `chmod 666 {tun}` as root." if there else f"Give this machine or container {tun}.",
                code="Permission",
            )
        return cls(Path(str(found["pasta"])), Path(str(found["nft"])))
