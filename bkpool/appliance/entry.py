"""Before and around the event loop: the home and its lock, the backend, the programs; and removing it all again.

What must be right before anything is opened is checked here. It starts no room.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import structlog

from bkpool.appliance.process import ProcessAppliance
from bkpool.appliance.settings import Settings, Tell
from bkpool.core.documents import read_pools
from bkpool.core.errors import HostFault
from bkpool.gateway.server import new_loop
from bkpool.home.files import as_host_fault, write_private
from bkpool.home.lock import HomeLock
from bkpool.toolchain import Tool, Toolchain
from bkpool.workers.process import ProcessRuntime
from bkpool.workers.sandbox import Binaries


def run(settings: Settings, tell: Tell) -> int:
    """Runs an appliance until SIGTERM or SIGINT.

    Args:
        settings: How.
        tell: Called with {"progress": text} while it starts, then once with what `appliance.json` says.

    Returns:
        The exit code: 0 after a drain, forced or not.

    Raises:
        BkpoolError: It can't start; nothing is left half-started.
    """
    _configure_logging()
    pools = [
        pool
        for path in settings.pool_files
        for pool in read_pools(path.read_text("utf-8", "replace"), source=str(path))
    ]
    with HomeLock(settings.home), as_host_fault(settings.home):
        _check_complete(settings.home)
        backend = _backend(settings)
        tell({"progress": f"backend: {backend} ({_WHY[settings.backend]})"})
        binaries = _binaries(settings, tell)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(ProcessAppliance(settings, pools, binaries).run(tell))
    return 0


def purge(home: Path, cache: Path) -> None:
    """Removes everything an appliance keeps: caches, leases, certificates and keys. Only what bkpool made goes.

    Raises:
        HostFault: An appliance still runs from this home, or something can't be removed.
    """
    if not home.is_dir():
        return
    with HomeLock(home), as_host_fault(home):
        asyncio.run(_purge_workers(home, Toolchain(cache)))
        for name in ("slots", "logs", "pki"):
            if (home / name).exists():
                shutil.rmtree(home / name)
        for name in ("state.db", "state.db-wal", "state.db-shm", "admin.token", "appliance.json", "backend"):
            (home / name).unlink(missing_ok=True)


def sweep(home: Path, cache: Path) -> int:
    """Ends the workers that an appliance left running when it was killed; leases and caches are kept.

    Returns:
        How many there were.

    Raises:
        HostFault: An appliance runs from this home.
    """
    with HomeLock(home), as_host_fault(home):
        return asyncio.run(_sweep_workers(home, Toolchain(cache)))


async def _purge_workers(home: Path, tools: Toolchain) -> None:
    runtime = ProcessRuntime(home, Binaries.found(tools.find))
    await runtime.adopt()
    await runtime.purge()


async def _sweep_workers(home: Path, tools: Toolchain) -> int:
    runtime = ProcessRuntime(home, Binaries.found(tools.find))
    await runtime.adopt()
    left = len(runtime.observe())
    await runtime.close(stop_workers=True)
    return left


_WHY = {"auto": "the default here: it needs no container engine and no cluster", "process": "as asked"}


def _backend(settings: Settings) -> str:
    """The backend of this home: the first `up` decides, and later ones never silently change worlds.

    Raises:
        HostFault: This home was made with another backend.
    """
    wanted = "process" if settings.backend == "auto" else settings.backend
    record = settings.home / "backend"
    kept = record.read_text("utf-8").strip() if record.exists() else wanted
    if kept != wanted:
        raise HostFault(
            f"--backend: {settings.home} holds a world of backend {kept!r}, not {wanted!r}",
            hint=f"Use --backend {kept}, another BKPOOL_HOME, or `bkpool down --purge` to begin anew.",
            code="OtherBackend",
        )
    if not record.exists():
        write_private(record, f"{wanted}\n".encode())
    return wanted


def _check_complete(home: Path) -> None:
    """A home with leases but without their CA was damaged: a new CA would void every certificate without a word.

    Raises:
        HostFault: `pki/` is missing although there is a store.
    """
    if (home / "state.db").exists() and not (home / "pki").exists():
        raise HostFault(
            f"{home / 'pki'} is missing, and {home / 'state.db'} has leases that were signed with it",
            hint="Restore pki/ from a backup. If it is lost: `bkpool down --purge` removes the leases too.",
            code="Unreadable",
        )


def _binaries(settings: Settings, tell: Tell) -> Binaries:
    """The programs that workers need; as an ordinary user also rootlesskit. Gets what is missing."""

    def progress(tool: Tool, text: str, fraction: float | None) -> None:  # noqa: ARG001 - a line has no bar
        tell({"progress": f"{tool}: {text}"})

    tools = [Tool.BUILDKITD, Tool.RUNC, Tool.BUILDX] + ([] if os.geteuid() == 0 else [Tool.ROOTLESSKIT])
    found = Toolchain(settings.cache, progress=progress).ensure_all(tools)
    return Binaries(found[Tool.BUILDKITD], found[Tool.RUNC], found.get(Tool.ROOTLESSKIT))


def _configure_logging() -> None:
    human = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if human else structlog.processors.JSONRenderer(default=str),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
