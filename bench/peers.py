"""The compared proxies, each with a configuration that makes it do the same work as the gateway.

Each verifies the client's certificate and looks up its lease, resumes no session, and opens a connection to the
worker for each connection of the client. A proxy that cannot do a leg reports it and is left out there.
"""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from string import Template
from typing import Protocol

from bench import programs
from bench.certificates import Pki
from bench.process import FaultError, Program, free_port

UNIX, TLS = "unix", "tls"
LEGS = {UNIX: "TLS → Unix socket", TLS: "TLS → mTLS"}
"""The two kinds of connections to a worker: without TLS on this machine, with TLS to a pod."""


@dataclass(frozen=True)
class Place:
    """The surroundings of a proxy in one measurement."""

    directory: Path
    """Its own."""
    pki: Pki
    leg: str
    socket: Path
    """The worker without TLS."""
    worker_port: int
    """The worker with TLS, on loopback."""
    connections: int
    """The most connections at once."""
    workers: int = 1
    """The number of its processes, threads or event loops."""
    port: int = field(default_factory=free_port)


class Peer(Protocol):
    """One of the proxies."""

    @property
    def name(self) -> str:
        """The name in the table."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Additional environment variables of its process."""

    def version(self) -> str:
        """Returns its version. Raises FaultError if it is not installed."""

    def command(self, place: Place) -> list[str | Path]:
        """Writes its configuration and returns its command line.

        Raises:
            FaultError: It is not installed, or cannot do this leg.
        """


class Nginx:
    """Debian's nginx with its `stream` module."""

    name = "nginx"
    environment: Mapping[str, str] = {}
    _module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

    def version(self) -> str:
        return programs.version(programs.found("nginx"), "-v").removeprefix("nginx version: ")

    def command(self, place: Place) -> list[str | Path]:
        if not self._module.exists():
            raise FaultError("its module is not installed (Debian: apt-get install libnginx-mod-stream)")
        values = {
            "module": self._module,
            "user": getpass.getuser(),
            "descriptors": 2 * place.connections + 64,
            "reuseport": "reuseport" if place.workers > 1 else "",
            "target": f"127.0.0.1:{place.worker_port}" if place.leg == TLS else f"unix:{place.socket}",
            "tls_out": _filled("nginx-tls-out.conf", place) if place.leg == TLS else "",
        }
        config = place.directory / "nginx.conf"
        config.write_text(_filled("nginx.conf", place, **values))
        return [programs.found("nginx"), "-p", place.directory, "-c", config, "-e", place.directory / "start.log"]


class Haproxy:
    """Debian's HAProxy. OpenSSL's own configuration keeps it from making two sessions for each connection."""

    name = "HAProxy"
    environment: Mapping[str, str] = {"OPENSSL_CONF": str(programs.HERE / "configs" / "openssl.cnf")}

    def version(self) -> str:
        return programs.version(programs.found("haproxy"), "-v").partition("-")[0]

    def command(self, place: Place) -> list[str | Path]:
        tls = (
            f"ssl crt {place.pki.directory}/dialler.pem ca-file {place.pki.directory}/backend-ca.crt verify required "
            "verifyhost sink sni str(sink) alpn h2 ssl-min-ver TLSv1.3 no-ssl-reuse"
        )
        (place.directory / "leases.map").write_text("".join(f"alloc:{token} worker\n" for token in place.pki.tokens))
        config = place.directory / "haproxy.cfg"
        config.write_text(
            _filled(
                "haproxy.cfg",
                place,
                target=f"127.0.0.1:{place.worker_port}" if place.leg == TLS else f"unix@{place.socket}",
                tls_out=tls if place.leg == TLS else "",
            )
        )
        return [programs.found("haproxy"), "-db", "-f", config]


class Ghostunnel:
    """ghostunnel, built from source. It has TLS on one side only, as a client or as a server."""

    name = "ghostunnel"
    environment: Mapping[str, str] = {
        "GODEBUG": "tlsmlkem=0"
    }  # OpenSSL of the others has no post-quantum key exchange

    def version(self) -> str:
        programs.ghostunnel()
        return f"ghostunnel {programs.GHOSTUNNEL_VERSION}"

    def command(self, place: Place) -> list[str | Path]:
        if place.leg == TLS:
            raise FaultError("left out: one process of it has TLS on one side only")
        pki = place.pki.directory
        command: list[str | Path] = [programs.ghostunnel(), "server"]
        command += [f"--listen=127.0.0.1:{place.port}", f"--target=unix:{place.socket}"]
        command += [f"--cert={pki}/server.crt", f"--key={pki}/server.key", f"--cacert={pki}/ca.crt", "--quiet=all"]
        return command + [
            f"--allow-cn=alloc:{token}" for token in place.pki.tokens
        ]  # the tokens are of no use elsewhere


@dataclass(frozen=True)
class Bkpool:
    """bkpool's own gateway.

    Args:
        loop: "uvloop" or "asyncio".
    """

    loop: str = "uvloop"
    name: str = "bkpool"
    environment: Mapping[str, str] = field(default_factory=dict)

    def version(self) -> str:
        """Returns the versions that its speed depends on."""
        loop = f"uvloop {installed('uvloop')}" if self.loop == "uvloop" else "asyncio"
        return f"Python {sys.version.split()[0]}, {loop}"

    def command(self, place: Place) -> list[str | Path]:
        config = place.directory / "gateway.json"
        settings = {
            "pki": str(place.pki.directory),
            "tokens": place.pki.tokens,
            "endpoint": f"tcp://127.0.0.1:{place.worker_port}" if place.leg == TLS else f"unix://{place.socket}",
            "port": place.port,
            "connections": place.connections,
            "loop": self.loop,
            "threads": place.workers,
        }
        config.write_text(json.dumps(settings))
        return [sys.executable, "-m", "bench.gateway", config]


@contextmanager
def running(peer: Peer, place: Place, on: set[int] | None) -> Iterator[Program]:
    """Starts the proxy, and waits until it listens.

    Raises:
        FaultError: It is not installed, cannot do this leg, or does not start.
    """
    with Program(peer.command(place), place.directory / "log", on=on, environment=peer.environment) as program:
        program.wait_for_port(place.port)
        yield program


def _filled(name: str, place: Place, **more: object) -> str:
    values = {
        "directory": place.directory,
        "pki": place.pki.directory,
        "port": place.port,
        "workers": place.workers,
        "connections": place.connections,
    }
    return Template((programs.HERE / "configs" / name).read_text()).substitute(values, **more)
