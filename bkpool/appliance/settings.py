"""How an appliance runs, as the command line says it. Nothing is checked or opened here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from bkpool.core.names import API_PORT, DEV_ISSUER_PORT, METRICS_PORT, SYSTEM_NAMESPACE, Key
from bkpool.kube import ClusterAccess

Tell = Callable[[dict[str, Any]], None]
"""Told {"progress": text} while the appliance starts, then once what `appliance.json` says."""

Address = tuple[str, int]


class Role(StrEnum):
    """What one process of an appliance does; on a single machine one does it all."""

    API = "api"
    CONTROLLER = "controller"
    GATEWAY = "gateway"


ALL_ROLES = frozenset(Role)


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
    plain_http: bool = False
    """Serve the API without TLS also where others could listen on the way."""
    api_tls: bool = False
    """Serve the API over TLS, with a certificate of the appliance's own authority unless files are given."""
    api_cert: Path | None = None
    """The API's certificate with its chain; with `api_key` in PEM. Read again when they change."""
    api_key: Path | None = None
    dev_issuer: bool = False
    """Also serve an issuer that makes tokens for whoever asks: for development, on loopback only."""
    dev_issuer_address: Address = ("127.0.0.1", DEV_ISSUER_PORT)

    # kind and kubernetes
    cluster: str = "bkpool"
    """The name of the kind cluster."""
    node_image: str | None = None
    buildkit_image: str | None = None
    image_archives: tuple[Path, ...] = ()
    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str = SYSTEM_NAMESPACE
    """Where the appliance itself is in the cluster: its keys and its Lease."""
    roles: frozenset[Role] = ALL_ROLES
    pool: Key | None = None
    """The one pool of a gateway that runs alone."""
    pool_namespaces: tuple[str, ...] = ()
    """Where pools may be; none: everywhere. Rights to see pods are needed in these only."""
    image: str | None = None
    """bkpool's own, for the gateways that the controller makes; None: the one that the manifests name."""

    @property
    def api_scheme(self) -> str:
        """Of the API's URL."""
        return "https" if self.api_tls or self.api_cert else "http"

    @property
    def dev_issuer_url(self) -> str | None:
        """The name of the development issuer, by which its tokens are known; None where there is none."""
        host, port = self.dev_issuer_address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}" if self.dev_issuer else None

    @property
    def access(self) -> ClusterAccess:
        """The cluster, where it is not one of kind."""
        return ClusterAccess(self.kubeconfig, self.context)
