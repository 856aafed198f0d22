"""Waits for the API server of a kind cluster."""

from __future__ import annotations

import ssl
import time
from base64 import b64decode
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from bkpool.core import yaml_text
from bkpool.core.errors import Unavailable

_RETRY_SECONDS = 0.2


def await_api_server(name: str, kubeconfig: Path, timeout: timedelta) -> None:
    """Waits until the API server of a cluster is ready.

    Args:
        name: The cluster's name, for the message.
        kubeconfig: Its kubeconfig.
        timeout: How long it may take. On two cores that of a restarted node is ready after about 15 s.

    Raises:
        Unavailable: It is not ready in time.
    """
    cluster = cast("dict[str, Any]", yaml_text.load(kubeconfig.read_text("utf-8")))["clusters"][0]["cluster"]
    trust = ssl.create_default_context(cadata=b64decode(cluster["certificate-authority-data"]).decode())
    deadline = time.monotonic() + timeout.total_seconds()
    while fault := _fault(urlsplit(cluster["server"]).netloc, trust):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"the API server of the kind cluster {name!r} does not answer at {cluster['server']}: {fault}",
                hint=f"`docker logs {name}-control-plane` shows its node; `bkpool down --purge` removes the cluster.",
            )
        time.sleep(_RETRY_SECONDS)


def _fault(address: str, trust: ssl.SSLContext) -> str | None:
    """Why an API server is not ready; None if it is. It is asked directly, without a configured proxy."""
    connection = HTTPSConnection(address, context=trust, timeout=5)
    try:
        connection.request("GET", "/readyz")  # needs no credential: the cluster role system:public-info-viewer
        response = connection.getresponse()
        return None if response.status == HTTPStatus.OK else f"{response.status} {response.reason}"
    except (OSError, HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
