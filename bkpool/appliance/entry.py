"""Runs an appliance: what happens before the event loop starts, and the event loop itself.

It opens nothing by itself; `host` and `replica` do that inside of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from bkpool.appliance.end_deadline import END_TIMEOUT, EndDeadline
from bkpool.appliance.host import HostAppliance
from bkpool.appliance.logs import configure_logging
from bkpool.appliance.preflight import check_settings
from bkpool.appliance.prepare import choose_backend, prepare_backend
from bkpool.appliance.replica import make_replica
from bkpool.appliance.reporting import StartupReporter
from bkpool.appliance.run_options import ALL_ROLES, RunOptions
from bkpool.core.documents import Documents, read_documents
from bkpool.gateway.control.server import new_loop
from bkpool.home.files import as_host_fault
from bkpool.home.lock import HomeLock
from bkpool.toolchain.descriptor_limit import raise_limit


def run(options: RunOptions, report: StartupReporter) -> int:
    """Runs an appliance, or some of its roles, until SIGTERM or SIGINT.

    Args:
        options: How it runs.
        report: Receives progress while it starts, then once the content of `appliance.json`.

    Returns:
        The exit code: 0 after a drain, forced or not.

    Raises:
        BkpoolError: It cannot start; nothing stays half-started.
    """
    configure_logging(options.home, options.settings.appliance.log_size)
    raise_limit()
    check_settings(options)
    if options.settings.appliance.roles != ALL_ROLES:
        with EndDeadline() as deadline:
            _run_loop(make_replica(options).run(deadline))
        return 0
    documents = _read_documents(options.pool_files)
    with HomeLock(options.home), as_host_fault(options.home):
        backend, reason = choose_backend(options)
        report({"progress": f"backend: {backend} ({reason})"})
        opener = prepare_backend(backend, options, report)
        stop_timeout = options.settings.workers.stop_timeout.total_seconds()
        with EndDeadline(END_TIMEOUT + stop_timeout) as deadline:
            _run_loop(HostAppliance(options, documents, backend, opener).run(report, deadline))
    return 0


def _read_documents(files: Iterable[Path]) -> Documents:
    """The objects of the user's files. Raises InvalidInput if one is wrong or occurs twice."""
    documents = Documents()
    for path in files:
        documents += read_documents(path.read_text("utf-8", "replace"), source=str(path))
    documents.check_unique()
    return documents


def _run_loop(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work)
