"""What one run of an appliance was given: its directories, its backend, its pool files and its settings.

Nothing is checked or opened here. What an operator can set, with its defaults, is in `bkpool.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bkpool.core.names import AUDIENCE
from bkpool.kube import ClusterAccess
from bkpool.settings import Address, Role, Settings
from bkpool.settings.catalogue import find
from bkpool.settings.model import ALL_ROLES

__all__ = ["ALL_ROLES", "Address", "Role", "RunOptions"]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How an appliance runs.

    Attributes:
        home: Its directory (BKPOOL_HOME).
        cache: The directory of the programs that it gets.
        backend: `auto`, `process`, `kind` or `kubernetes`.
        pool_files: Files with pools and issuers.
        settings: What an operator can set.
        places: Name of a setting to where its value was given; those with defaults are missing.
    """

    home: Path
    cache: Path
    backend: str = "auto"
    pool_files: tuple[Path, ...] = ()
    settings: Settings = Settings()  # noqa: RUF009 - immutable
    places: Mapping[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """What a message about a setting begins with, so that it names what the user typed.

        Args:
            name: The setting, such as api.address.

        Returns:
            The option, the variable, or the place in a file that gave the value. For a default the option that would
            change it, or the variable if there is no such option.
        """
        setting = find(name)
        return self.places.get(name) or setting.option or setting.variable

    @property
    def api_scheme(self) -> str:
        """The scheme of the API's URL."""
        return "https" if self.settings.api.tls or self.settings.api.cert else "http"

    @property
    def audience(self) -> str:
        """The audience of callers' tokens, where the configuration of their issuer names none."""
        return self.settings.identity.audience or self.settings.api.external_url or AUDIENCE

    @property
    def dev_issuer_url(self) -> str | None:
        """The URL of the development issuer, which its tokens name; None where there is none."""
        issuer = self.settings.dev_issuer
        return f"http://{issuer.address}" if issuer.enabled else None

    @property
    def access(self) -> ClusterAccess:
        """The cluster, where it is not a cluster of kind."""
        return ClusterAccess(
            self.settings.kubernetes.kubeconfig,
            self.settings.kubernetes.context,
            kubeconfig_from=self.where("kubernetes.kubeconfig"),
            context_from=self.where("kubernetes.context"),
        )
