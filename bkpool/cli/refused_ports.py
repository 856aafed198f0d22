"""Explains a build that failed because a port of the worker's own loopback refused a connection.

Users name a registry or a proxy of their machine as `localhost:5000`, and a worker's loopback is another one. Nothing
here changes what happened.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from bkpool.cli import console, home

_REFUSED = re.compile(r"dial tcp (?:127\.[\d.]+|\[::1\]):(\d+): connect: connection refused")
_TIMEOUT = 10  # seconds. The build has failed already, and the user waits for the end of the command


def explain(buildx: str, builder: str, environment: Mapping[str, str]) -> None:
    """Asks buildx why the last build failed, and names the field that would help. Silent for other reasons."""
    command = [buildx, "history", "inspect", "--builder", builder, "--format", "json"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    own = appliance.ports if (appliance := home.running()) else frozenset()  # no pool may have them
    if ports := [port for port in refused(done.stdout.decode(errors="replace")) if port not in own]:
        console.note(
            f"note: nothing listens on port {' and '.join(map(str, ports))} of the worker's loopback. To reach that "
            f"port of the machine that runs the worker, the pool needs networking: {{hostPorts: {ports}}}"
        )


def refused(record: str) -> list[int]:
    """The loopback ports that refused a connection, by the record of a build.

    Args:
        record: What `buildx history inspect` prints.
    """
    return sorted({int(port) for port in _REFUSED.findall(record)})
