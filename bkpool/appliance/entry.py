"""Before and around the event loop: the home and its lock, the backend, the programs; and removing it all again.

What must be right before anything is opened is checked here. It starts no room.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import structlog

from bkpool.appliance import backend_choice, replica
from bkpool.appliance.backend import open_cluster, open_process
from bkpool.appliance.host import HostAppliance, Opening
from bkpool.appliance.settings import ALL_ROLES, Settings, Tell
from bkpool.core.documents import Documents, read_documents
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.core.names import LOOPBACK
from bkpool.gateway.control.server import new_loop
from bkpool.gateway.net.tls_context import ignore_invalid_server_names
from bkpool.home.files import as_host_fault, write_private
from bkpool.home.lock import HomeLock
from bkpool.kind.engine import Engine, engine_fault
from bkpool.kind.lifecycle import Cluster, Kind, Marker
from bkpool.kube import ClusterAccess
from bkpool.toolchain import Tool, Toolchain
from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries


def run(settings: Settings, tell: Tell) -> int:
    """Runs an appliance, or the roles of one, until SIGTERM or SIGINT.

    Args:
        settings: How.
        tell: Called with {"progress": text} while it starts, then once with what `appliance.json` says.

    Returns:
        The exit code: 0 after a drain, forced or not.

    Raises:
        BkpoolError: It can't start; nothing is left half-started.
    """
    configure_logging()
    _check_address(settings)
    if settings.roles != ALL_ROLES:
        _serve(replica.of_roles(settings).run())
        return 0
    documents = _documents(settings.pool_files)
    with HomeLock(settings.home), as_host_fault(settings.home):
        backend, why = _backend(settings)
        tell({"progress": f"backend: {backend} ({why})"})
        _serve(HostAppliance(settings, documents, backend, _opening(backend, settings, tell)).run(tell))
    return 0


def _documents(files: Iterable[Path]) -> Documents:
    """What the user's files say, all of it right. Raises InvalidInput."""
    found = Documents()
    for path in files:
        found += read_documents(path.read_text("utf-8", "replace"), source=str(path))
    found.check_once()
    return found


def _serve(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work)


def _opening(backend: str, settings: Settings, tell: Tell) -> Opening:
    """Prepares what the backend needs before the event loop runs, and says how it is opened in it."""
    match backend:
        case backend_choice.PROCESS:
            _check_complete(settings.home)
            binaries = _binaries(settings, tell)
            return lambda stack, tell: open_process(stack, settings, binaries, tell)
        case backend_choice.KIND:
            cluster = _kind_cluster(settings, tell)
            access = ClusterAccess(cluster.kubeconfig)
            return lambda stack, tell: open_cluster(stack, settings, access, cluster.worker_ports, tell)
        case _:
            return lambda stack, tell: open_cluster(stack, settings, settings.access, None, tell)


def _kind_cluster(settings: Settings, tell: Tell) -> Cluster:
    """The kind cluster of this home, made if need be, with the images that are given."""
    program = _tools(settings, tell).ensure_all([Tool.KIND, Tool.BUILDX])[Tool.KIND]
    with Engine.connect() as engine:
        kind = Kind(program, engine, settings.home, tell)
        cluster = kind.ensure(settings.cluster, node_image=settings.node_image)
        for archive in settings.image_archives:
            kind.load_archive(cluster, archive)
        if settings.buildkit_image is not None:
            kind.load_image(cluster, settings.buildkit_image)
    return cluster


def purge(home: Path, cache: Path) -> str:
    """Removes everything an appliance keeps: caches, leases, certificates, keys, and the kind cluster that it made.

    Returns:
        What is left, for the user; empty where nothing is.

    Raises:
        HostFault: An appliance still runs from this home, or something can't be removed.
    """
    left = ""
    if not home.is_dir():
        return left
    with HomeLock(home), as_host_fault(home):
        tools = Toolchain(cache)
        asyncio.run(_purge_workers(home, tools))
        if marker := Marker.read(home):
            with Engine.connect() as engine:
                deleted = Kind(tools.ensure(Tool.KIND), engine, home, lambda _told: None).delete()
            left = "" if deleted else f"the cluster {marker.name} was not made from here, and stays"
        for name in ("slots", "logs", "pki"):
            if (home / name).exists():
                shutil.rmtree(home / name)
        for name in (
            "state.db",
            "state.db-wal",
            "state.db-shm",
            "admin.token",
            "appliance.json",
            "backend",
            "remembered.toml",
        ):
            (home / name).unlink(missing_ok=True)
    return left


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


def _backend(settings: Settings) -> tuple[str, str]:
    """The backend of this home, which is recorded, and why it is that one."""
    record = settings.home / "backend"
    kept = record.read_text("utf-8").strip() if record.exists() else None
    backend, why = backend_choice.choose_backend(settings.backend, kept, engine_fault, settings.home)
    if kept is None:
        write_private(record, f"{backend}\n".encode())
    return backend, why


def _check_address(settings: Settings) -> None:
    """A bearer token that crosses a network in clear is the whole network's: that must be asked for.

    Raises:
        InvalidInput: The API would be served in clear beyond this machine, one of its two files is missing, or an
            issuer that believes everybody would be.
    """
    if (settings.api_cert is None) != (settings.api_key is None):
        given, missing = ("--api-cert", "--api-key") if settings.api_cert else ("--api-key", "--api-cert")
        raise InvalidInput(f"{given}: {missing} is missing", hint="Give both files, or neither.", field=missing)
    host, _ = settings.api_address
    if host not in LOOPBACK and settings.api_scheme == "http" and not settings.plain_http:
        raise InvalidInput(
            f"--api-address: {host} is reached from other machines, and the API would be served in clear",
            hint="Add --api-tls (or --api-cert and --api-key), keep it on 127.0.0.1, or add --plain-http.",
            field="--api-address",
        )
    if settings.dev_issuer:
        _check_dev_issuer(settings)


def _check_dev_issuer(settings: Settings) -> None:
    """Whoever reaches the development issuer may be anybody: nobody beyond this machine, and no cluster.

    Raises:
        InvalidInput: It, or the API that believes it, would be reached from elsewhere.
    """
    for option, (host, _) in (
        ("--dev-issuer-address", settings.dev_issuer_address),
        ("--api-address", settings.api_address),
    ):
        if host not in LOOPBACK:
            raise InvalidInput(
                f"{option}: {host} is reached from other machines, and the development issuer makes a token for "
                "whoever asks",
                hint="Keep both on 127.0.0.1, or leave --dev-issuer out and configure a real issuer.",
                field=option,
            )
    if settings.dev_issuer_address[1] == 0:
        raise InvalidInput(
            "--dev-issuer-address: port 0 is none by which an issuer could be known",
            hint="Give the port: tokens carry it in their issuer's name.",
            field="--dev-issuer-address",
        )
    if settings.roles != ALL_ROLES:
        raise InvalidInput(
            "--dev-issuer: a replica in a cluster has no development issuer",
            hint="Configure the cluster's own issuer, or a real one.",
            field="--dev-issuer",
        )


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
    tools = [Tool.BUILDKITD, Tool.RUNC, Tool.BUILDX] + ([] if os.geteuid() == 0 else [Tool.ROOTLESSKIT])
    found = _tools(settings, tell).ensure_all(tools)
    return Binaries(found[Tool.BUILDKITD], found[Tool.RUNC], found.get(Tool.ROOTLESSKIT))


def _tools(settings: Settings, tell: Tell) -> Toolchain:
    def progress(tool: Tool, text: str, fraction: float | None) -> None:  # noqa: ARG001 - a line has no bar
        tell({"progress": f"{tool}: {text}"})

    return Toolchain(settings.cache, progress=progress)


def configure_logging() -> None:
    """Lines for people on a terminal, JSON in a pipe; what is only for debugging is left out."""
    human = sys.stderr.isatty()
    sys.unraisablehook = ignore_invalid_server_names
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if human else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
