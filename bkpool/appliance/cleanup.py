"""Cleans up after an appliance that has ended: its leftover workers, or everything that it stored.

Both hold the home's lock, so they never touch an appliance that runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from bkpool.home import local_socket
from bkpool.home.files import as_host_fault
from bkpool.home.lock import HomeLock
from bkpool.kind.engine import Engine
from bkpool.kind.lifecycle import HomeCluster
from bkpool.kind.marker import Marker
from bkpool.toolchain import Tool, Toolchain
from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries

_DIRECTORIES = ("slots", "logs", "pki", "pki.rotating", "pki.draft", "pki.before")
_FILES = (
    *("state.db", "state.db-wal", "state.db-shm", "admin.token", "appliance.json", "backend"),
    *("remembered.toml", "running.json"),
)
_COPIES = "state.db.schema-*"  # from before upgrades (store/migration.py)


def purge(home: Path, cache: Path) -> str:
    """Removes all that an appliance stored: caches, leases, certificates, keys, and the kind cluster it created.

    Args:
        home: BKPOOL_HOME.
        cache: The directory of the programs; it stays.

    Returns:
        What was not removed, as a sentence for the user; empty if nothing is left.

    Raises:
        HostFault: An appliance still runs from this home, or something cannot be removed.
    """
    if not home.is_dir():
        return ""
    with HomeLock(home), as_host_fault(home):
        tools = Toolchain(cache)
        asyncio.run(_purge_workers(home, tools))
        left = _delete_kind_cluster(home, tools)
        for name in _DIRECTORIES:
            if (home / name).exists():
                shutil.rmtree(home / name)
        for path in (*(home / name for name in _FILES), *home.glob(_COPIES)):
            path.unlink(missing_ok=True)
    return left


def stop_leftover_workers(home: Path, cache: Path) -> int:
    """Stops the workers that an appliance left running when it was killed. Leases and caches stay.

    Args:
        home: BKPOOL_HOME.
        cache: The directory of the programs.

    Returns:
        How many workers there were.

    Raises:
        HostFault: An appliance runs from this home.
    """
    with HomeLock(home), as_host_fault(home):
        return asyncio.run(_stop_workers(home, Toolchain(cache)))


def _delete_kind_cluster(home: Path, tools: Toolchain) -> str:
    """Deletes the kind cluster that this home created; returns a sentence about one that it only adopted."""
    marker = Marker.read(home)
    if marker is None:
        return ""
    with Engine.connect() as engine:
        deleted = HomeCluster(tools.ensure(Tool.KIND), engine, home, lambda _text: None).delete()
    return "" if deleted else f"The cluster {marker.name} was not created by this appliance, so it stays."


async def _purge_workers(home: Path, tools: Toolchain) -> None:
    runtime = ProcessRuntime(home, Binaries.found(tools.find))
    await runtime.adopt(to_stop=True)
    await runtime.purge()
    local_socket.remove(home, os.environ)


async def _stop_workers(home: Path, tools: Toolchain) -> int:
    runtime = ProcessRuntime(home, Binaries.found(tools.find))
    await runtime.adopt(to_stop=True)
    count = len(runtime.daemons.observe())
    await runtime.close(stop_workers=True)
    local_socket.remove(home, os.environ)
    return count
