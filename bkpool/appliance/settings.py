"""What one run of an appliance was given: its directories, its backend, its pool files and its configuration.

Nothing is checked or opened here. What an operator can set, with its defaults, is in `bkpool.settings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
