"""The certificates of one run. bkpool's authority makes them, in the files that the proxies need.

Two authorities, as in a cluster: one for clients and the gateway, one for workers. They are deleted after the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bkpool.core import tokens
from bkpool.pki.authority import Authority, Leaf

WORKER_UID = "bench"
_LIFE = timedelta(days=1)


@dataclass(frozen=True)
class Pki:
    """A directory of certificates, and the tokens in the clients' certificates."""

    directory: Path
    tokens: tuple[str, ...]


def issue(directory: Path, leases: int) -> Pki:
    """Fills a directory: ca, server, client-N for each lease; backend-ca, sink, worker, dialler."""
    now = datetime.now(UTC)
    end = now + _LIFE
    clients, backend = Authority.create(now), Authority.create(now, name="bkpool backend CA")
    made = tuple(tokens.derive(directory.name.encode(), WORKER_UID, str(number)) for number in range(leases))
    (directory / "ca.crt").write_bytes(clients.cert_pem)
    (directory / "backend-ca.crt").write_bytes(backend.cert_pem)
    _write(directory, "server", clients.issue_server(["localhost"], [], now, end))
    for number, token in enumerate(made):
        _write(directory, f"client-{number}", clients.issue_client(token, now, end))
    _write(directory, "sink", backend.issue_server(["sink"], [], now, end))
    _write(directory, "worker", backend.issue_worker(WORKER_UID, now))
    _write(directory, "dialler", backend.issue_dialler("bench", now, end))
    return Pki(directory, made)


def _write(directory: Path, name: str, leaf: Leaf) -> None:
    key = leaf.key_pem or b""
    (directory / f"{name}.crt").write_bytes(leaf.cert_pem)
    (directory / f"{name}.key").write_bytes(key)
    (directory / f"{name}.pem").write_bytes(leaf.cert_pem + key)  # the format of HAProxy
