"""How one run of an appliance was asked for: its directories, its backend, its pool files, and its configuration.

Nothing is checked or opened here. What an operator can set, with its defaults, is in `bkpool.settings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from bkpool.core.names import Key
from bkpool.kube import ClusterAccess
from bkpool.settings import Address, Configuration, Role
from bkpool.settings.model import ALL_ROLES

__all__ = ["ALL_ROLES", "Address", "Role", "Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How an appliance runs.

    Attributes:
        home: Its directory (BKPOOL_HOME).
        cache: The directory of the programs that it gets.
        backend: `auto`, `process`, `kind` or `kubernetes`.
        pool_files: Files with pools and issuers.
        configuration: What an operator can set.
    """

    home: Path
    cache: Path
    backend: str = "auto"
    pool_files: tuple[Path, ...] = ()
    configuration: Configuration = Configuration()  # noqa: RUF009 - immutable

    @property
    def api_address(self) -> Address:
        """See `bkpool.settings.model`."""
        return self.configuration.api.address

    @property
    def gateway_address(self) -> Address | None:
        """See `bkpool.settings.model`."""
        return self.configuration.gateway.address

    @property
    def metrics_address(self) -> Address:
        """See `bkpool.settings.model`."""
        return self.configuration.metrics.address

    @property
    def gateway_hosts(self) -> tuple[str, ...]:
        """See `bkpool.settings.model`."""
        return self.configuration.gateway.hosts

    @property
    def drain_timeout(self) -> timedelta:
        """See `bkpool.settings.model`."""
        return self.configuration.appliance.drain_timeout

    @property
    def plain_http(self) -> bool:
        """See `bkpool.settings.model`."""
        return self.configuration.api.plain_http

    @property
    def api_tls(self) -> bool:
        """See `bkpool.settings.model`."""
        return self.configuration.api.tls

    @property
    def api_cert(self) -> Path | None:
        """See `bkpool.settings.model`."""
        return self.configuration.api.cert

    @property
    def api_key(self) -> Path | None:
        """See `bkpool.settings.model`."""
        return self.configuration.api.key

    @property
    def dev_issuer(self) -> bool:
        """See `bkpool.settings.model`."""
        return self.configuration.dev_issuer.enabled

    @property
    def dev_issuer_address(self) -> Address:
        """See `bkpool.settings.model`."""
        return self.configuration.dev_issuer.address

    @property
    def cluster(self) -> str:
        """See `bkpool.settings.model`."""
        return self.configuration.kind.cluster

    @property
    def node_image(self) -> str | None:
        """See `bkpool.settings.model`."""
        return self.configuration.kind.node_image

    @property
    def buildkit_image(self) -> str | None:
        """See `bkpool.settings.model`."""
        return self.configuration.workers.buildkit_image

    @property
    def image_archives(self) -> tuple[Path, ...]:
        """See `bkpool.settings.model`."""
        return self.configuration.kind.image_archives

    @property
    def namespace(self) -> str:
        """See `bkpool.settings.model`."""
        return self.configuration.kubernetes.namespace

    @property
    def roles(self) -> frozenset[Role]:
        """See `bkpool.settings.model`."""
        return self.configuration.appliance.roles

    @property
    def pool(self) -> Key | None:
        """See `bkpool.settings.model`."""
        return self.configuration.gateway.pool

    @property
    def pool_namespaces(self) -> tuple[str, ...]:
        """See `bkpool.settings.model`."""
        return self.configuration.kubernetes.pool_namespaces

    @property
    def image(self) -> str | None:
        """See `bkpool.settings.model`."""
        return self.configuration.kubernetes.image

    @property
    def api_scheme(self) -> str:
        """The scheme of the API's URL."""
        return "https" if self.configuration.api.tls or self.configuration.api.cert else "http"

    @property
    def dev_issuer_url(self) -> str | None:
        """The URL of the development issuer, which its tokens name; None where there is none."""
        issuer = self.configuration.dev_issuer
        return f"http://{issuer.address}" if issuer.enabled else None

    @property
    def access(self) -> ClusterAccess:
        """The cluster, where it is not a cluster of kind."""
        return ClusterAccess(self.configuration.kubernetes.kubeconfig, self.configuration.kubernetes.context)
