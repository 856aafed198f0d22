"""Which cluster is used, and with which credentials: the pod's own, or those of a kubeconfig, as kubectl finds them.

It sends nothing to the API server. An error names where the user gave the file or the context; it quotes no line of
the file, which may be a secret.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bkpool.core import yaml_text
from bkpool.core.errors import HostFault, InvalidInput

if TYPE_CHECKING:
    from kubernetes.aio.client import Configuration

_MOST_BYTES = 1 << 20
"""Bytes of a kubeconfig. One with 200 clusters and their certificates has about half of it."""
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """Which cluster to use, and with which credentials.

    Without arguments: the cluster that this pod runs in, else the user's default kubeconfig.

    Attributes:
        kubeconfig: The file; None for the default one.
        context: The context in it; None for its current one.
        kubeconfig_from: What a message about the file begins with: where it was given, or what would give another.
        context_from: The same for the context.
    """

    kubeconfig: Path | None = None
    context: str | None = None
    kubeconfig_from: str = "kubeconfig"
    context_from: str = "context"

    @property
    def file(self) -> str:
        """The kubeconfig, for messages."""
        return str(self.kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")

    @property
    def file_from(self) -> str:
        """What a message about the file begins with."""
        by_variable = self.kubeconfig is None and os.environ.get("KUBECONFIG")
        return "KUBECONFIG" if by_variable else self.kubeconfig_from

    async def load(self) -> tuple[Configuration, str]:
        """The server with the credentials, and the default namespace.

        Raises:
            HostFault: There is no kubeconfig, or it cannot be used.
            InvalidInput: The kubeconfig does not have the context.
        """
        if self.kubeconfig is None and self.context is None and (_IN_CLUSTER / "token").exists():
            return _of_pod()
        return await self._of_kubeconfig()

    async def _of_kubeconfig(self) -> tuple[Configuration, str]:
        from kubernetes.aio import config  # noqa: PLC0415 - takes a second; only clusters need it
        from kubernetes.aio.client import Configuration  # noqa: PLC0415

        configuration = Configuration()
        file = str(self.kubeconfig) if self.kubeconfig else None
        try:
            _check_files(self.file)
            loader = await config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=file, context=self.context, client_configuration=configuration
            )
            namespace = (loader.current_context.get("context") or {}).get("namespace")
        except Exception as error:  # noqa: BLE001 - the library checks little, and fails as the content makes it
            self._check_context(file)
            raise self._no_access(_reason(error)) from None
        if not str(configuration.host).startswith(("https://", "http://")):
            raise self._no_access("the server in it is not a URL")
        return configuration, str(namespace or "default")

    def _no_access(self, reason: str) -> HostFault:
        return HostFault(
            f"{self.file_from}: {self.file} gives no access to a cluster: {reason}",
            hint="Give a kubeconfig with which `kubectl get nodes` works, by --kubeconfig or KUBECONFIG.",
            code="Unreadable",
        )

    def _check_context(self, file: str | None) -> None:
        """Raises InvalidInput if the file has contexts, but not this one."""
        from kubernetes.aio.config import kube_config  # noqa: PLC0415 - as above

        if self.context is None:
            return
        try:
            merged = kube_config.KubeConfigMerger(file or kube_config.KUBE_CONFIG_DEFAULT_LOCATION)  # type: ignore[no-untyped-call]
            names = [str(one["name"]) for one in merged.config.value["contexts"]]
        except Exception:  # noqa: BLE001 - as above; then the context is not the fault
            return
        if self.context not in names:
            raise InvalidInput(
                f"{self.context_from}: {self.file} has no context {self.context!r}",
                hint=f"It has: {', '.join(names)[:200] or 'none'}.",
                field=self.context_from,
            )


def _check_files(files: str) -> None:
    """Raises UnreadableYaml or OSError for a kubeconfig that the library would read for too long.

    Args:
        files: One path, or several as in KUBECONFIG. Some of them need not exist.
    """
    paths = [Path(file).expanduser() for file in filter(None, files.split(os.pathsep))]
    existing = [path for path in paths if path.exists()]
    if not existing:  # the library would print a line of its own
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in existing:
        with path.open("rb") as source:
            content = source.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise yaml_text.UnreadableYaml(f"it is larger than {_MOST_BYTES} bytes")
        yaml_text.load(content.decode())


def _of_pod() -> tuple[Configuration, str]:
    from kubernetes.aio import config  # noqa: PLC0415 - as above
    from kubernetes.aio.client import Configuration  # noqa: PLC0415

    configuration = Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return configuration, (_IN_CLUSTER / "namespace").read_text("utf-8").strip() or "default"
    except (config.ConfigException, OSError, ValueError) as error:
        raise HostFault(
            f"the pod's credentials in {_IN_CLUSTER} give no access to the cluster: {error}",
            hint="Mount the token of its ServiceAccount, or give a kubeconfig: --kubeconfig.",
            code="Unreadable",
        ) from None


def _reason(error: Exception) -> str:
    from kubernetes.aio import config  # noqa: PLC0415 - as above

    match error:
        case config.ConfigException():
            return str(error)
        case OSError():
            return error.strerror or type(error).__name__
        case yaml_text.UnreadableYaml(line=line):
            return f"{error.without_quotes()}{f' (line {line})' if line else ''}"
        case UnicodeDecodeError():
            return "it is not YAML"
    return "it is not a kubeconfig"
