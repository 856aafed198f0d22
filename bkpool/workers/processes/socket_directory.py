"""Where the sockets of a slot are, in the runtime directory of the appliance (home/runtime_directory.py).

It makes nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from bkpool.core.names import Slot
from bkpool.home.runtime_directory import check_length


def slot_directory(directory: Path, slot: Slot) -> Path:
    """Where the sockets of a slot are. People can read the name, as far as its length allows."""
    digest = hashlib.sha256(repr(tuple(slot)).encode()).hexdigest()[:6]
    return directory / f"{slot.pool[:16]}-{slot.number}-{digest}"


def check_slot_directory(directory: Path, slot: Slot) -> None:
    """Checks that the paths of a slot's sockets are not too long.

    Raises:
        HostFault: They are.
    """
    check_length(slot_directory(directory, slot) / "rootlesskit" / "api.sock", directory)
