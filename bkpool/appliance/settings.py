"""How an appliance runs, as the command line says it. Nothing is checked or opened here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from bkpool.core.names import API_PORT, METRICS_PORT

Tell = Callable[[dict[str, Any]], None]
"""Told {"progress": text} while the appliance starts, then once what `appliance.json` says."""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """How an appliance runs. Port 0 takes a free one."""

    home: Path
    cache: Path
    backend: str = "auto"
    api_address: Address = ("127.0.0.1", API_PORT)
    gateway_address: Address | None = None
    """None: loopback, or every interface once `gateway_hosts` name this machine to others."""
    metrics_address: Address = ("127.0.0.1", METRICS_PORT)
    gateway_hosts: tuple[str, ...] = ()
    """Further names and addresses of the gateway; the first one is told to clients."""
    pool_files: tuple[Path, ...] = ()
    drain_timeout: timedelta = timedelta(minutes=10)
    """How long open builds may go on after SIGTERM."""
