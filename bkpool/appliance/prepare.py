"""Prepares a backend before the event loop runs: the choice, the programs, the kind cluster.

All of it blocks. It opens no store and starts no worker.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from bkpool.appliance import backend_choice
from bkpool.appliance.backend import Backend, open_pod_backend, open_process_backend
from bkpool.appliance.preflight import check_home_complete, check_workers_can_start
from bkpool.appliance.reporting import StartupReporter
from bkpool.appliance.run_options import RunOptions
from bkpool.home.files import write_private
from bkpool.kind.engine import Engine, engine_fault
from bkpool.kind.lifecycle import Cluster, HomeCluster
from bkpool.kube import ClusterAccess
from bkpool.toolchain import Tool, Toolchain
from bkpool.workers.processes.sandbox import Binaries

BackendOpener = Callable[[AsyncExitStack, StartupReporter], Awaitable[Backend]]
"""Opens a prepared backend in the event loop; the stack closes it."""


def choose_backend(options: RunOptions) -> tuple[str, str]:
    """The backend of this home, and the reason for the choice. The choice is recorded in the home.

    Raises:
        HostFault: `OtherBackend`: the home was created with another backend. `Unreadable`: the record is damaged.
    """
    record = options.home / "backend"
    recorded = record.read_text("utf-8", "replace").strip() if record.exists() else None
    backend, reason = backend_choice.choose_backend(options.backend, recorded, engine_fault, options.home)
    if recorded is None:
        write_private(record, f"{backend}\n".encode())
    return backend, reason


def prepare_backend(backend: str, options: RunOptions, report: StartupReporter) -> BackendOpener:
    """Gets what the backend needs on this machine.

    Args:
        backend: Which one, as `choose_backend` returned it.
        options: How the appliance runs.
        report: Receives what is being done.

    Returns:
        What opens the backend.

    Raises:
        BkpoolError: A program cannot be found or built, or the cluster cannot be used.
    """
    match backend:
        case backend_choice.PROCESS:
            check_home_complete(options.home)
            check_workers_can_start(options)
            binaries = _ensure_binaries(options, report)
            return lambda stack, report: open_process_backend(stack, options, binaries, report)
        case backend_choice.KIND:
            cluster = _ensure_kind_cluster(options, report)
            access = ClusterAccess(cluster.kubeconfig)
            return lambda stack, report: open_pod_backend(stack, options, access, cluster.worker_ports, report)
        case _:
            return lambda stack, report: open_pod_backend(stack, options, options.access, None, report)


def _ensure_kind_cluster(options: RunOptions, report: StartupReporter) -> Cluster:
    """The kind cluster of this home with the images of the settings in it, created if there is none."""
    settings = options.settings
    program = _toolchain(options, report).ensure_all([Tool.KIND, Tool.BUILDX])[Tool.KIND]
    with Engine.connect() as engine:
        kind = HomeCluster(
            program,
            engine,
            options.home,
            lambda text: report({"progress": text}),
            settings.kind.ready_timeout,
        )
        cluster = kind.ensure(
            settings.kind.cluster, node_image=settings.kind.node_image, where=options.where("kind.cluster")
        )
        for archive in settings.kind.image_archives:
            kind.load_archive(cluster, archive, where=options.where("kind.image_archives"))
        if settings.workers.buildkit_image is not None:
            kind.load_image(cluster, settings.workers.buildkit_image)
    return cluster


def _ensure_binaries(options: RunOptions, report: StartupReporter) -> Binaries:
    """The programs that workers need, fetched if they are missing. An ordinary user also needs rootlesskit."""
    tools = [Tool.BUILDKITD, Tool.RUNC, Tool.BUILDX] + ([] if os.geteuid() == 0 else [Tool.ROOTLESSKIT])
    found = _toolchain(options, report).ensure_all(tools)
    return Binaries(found[Tool.BUILDKITD], found[Tool.RUNC], found.get(Tool.ROOTLESSKIT))


def _toolchain(options: RunOptions, report: StartupReporter) -> Toolchain:
    def progress(tool: Tool, text: str, fraction: float | None) -> None:  # noqa: ARG001 - a line of text shows no bar
        report({"progress": f"{tool}: {text}"})

    return Toolchain(options.cache, progress=progress)
