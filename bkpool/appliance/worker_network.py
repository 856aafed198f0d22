"""Decides which network the workers of this machine get, and who may be served with it.

A worker has a network of its own, unless the operator says otherwise or this machine cannot make one. In the last
case only the admin is served: a build would reach the API and the builds of other callers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import structlog

from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.tuning import gc_defaults, process_limits
from bkpool.core.errors import HostFault
from bkpool.toolchain.descriptor_limit import or_too_many_open_files
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers.processes.init_program import listening_ports
from bkpool.workers.processes.runtime import Binaries, ProcessRuntime

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessWorkers:
    """The runtime of this machine."""

    runtime: ProcessRuntime
    missing_network: HostFault | None
    """Why workers use the network of the machine although nobody wants that."""


async def open_process_workers(options: RunOptions, binaries: Binaries, environ: Mapping[str, str]) -> ProcessWorkers:
    """The runtime of this machine, with a network for each worker where that is possible and wanted.

    Args:
        options: How the appliance runs.
        binaries: The programs of workers.
        environ: The appliance's own.
    """
    if options.settings.workers.host_network:
        return ProcessWorkers(_runtime(options, binaries, None), None)
    try:
        runtime = _runtime(options, binaries, NetworkPrograms.find(environ.get("PATH", "")))
        await _try_network(runtime)
    except HostFault as error:
        fault = or_too_many_open_files(error)
        log.warning("workers.no_network", error=fault.message, hint=fault.hint)
        return ProcessWorkers(_runtime(options, binaries, None), fault)
    return ProcessWorkers(runtime, None)


async def _try_network(runtime: ProcessRuntime) -> None:
    """Tries twice: the result counts until the appliance ends, and somebody may just be removing directories."""
    try:
        await runtime.try_network()
    except HostFault:
        await runtime.try_network()


def _runtime(options: RunOptions, binaries: Binaries, network: NetworkPrograms | None) -> ProcessRuntime:
    return ProcessRuntime(
        options.home,
        binaries,
        network=network,
        own_ports=lambda: listening_ports(_configured_ports(options)),
        limits=process_limits(options.settings),
        gc_defaults=gc_defaults(options.settings),
    )


def _configured_ports(options: RunOptions) -> Collection[int]:
    settings = options.settings
    issuer = settings.dev_issuer
    addresses = (
        settings.api.address,
        settings.gateway.address,
        settings.metrics.address,
        issuer.address if issuer.enabled else None,
    )
    return {address.port for address in addresses if address and address.port}
