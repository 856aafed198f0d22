"""The environment of a worker: what it needs to work, and nothing with which a build could act as the host.

buildkitd itself signs requests to a cache in S3 or Azure, with every credential that its SDKs find. So it gets
neither the host's variables nor the host's home directory. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bkpool.workers.step_log import MAX_SIZE, MAX_SPEED

PATH = ":".join(
    (
        *("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"),
        *("/run/wrappers/bin", "/run/current-system/sw/bin"),  # NixOS has its programs here
    )
)
"""Where a worker finds programs such as git, whatever the user's own PATH is."""

NO_METADATA_SERVICE = {
    "AWS_EC2_METADATA_DISABLED": "true",
    # The only choice with which azidentity asks neither the metadata service nor the programs az, azd and pwsh.
    "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential",
    # BuildKit 0.34 has no code for Google's cloud. These are for a version that gets it.
    "GCE_METADATA_HOST": "metadata.invalid",
    "NO_GCE_CHECK": "true",
}
"""What stops the SDKs of clouds from asking the machine's metadata service for its identity."""

_PASSED_ON = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    MAX_SIZE,
    MAX_SPEED,
    *(name for lower in ("http_proxy", "https_proxy", "no_proxy", "all_proxy") for name in (lower, lower.upper())),
)


def worker_environment(host: Mapping[str, str], home: Path, **more: str) -> dict[str, str]:
    """The environment of a worker.

    Args:
        host: The appliance's own variables, for certificate paths, proxies and the limits of a step's log.
        home: The worker's home directory, which is empty.
        more: Variables that only this worker has.
    """
    passed = {name: host[name] for name in _PASSED_ON if name in host}
    return {"PATH": PATH, "HOME": str(home), **NO_METADATA_SERVICE, **passed, **more}
