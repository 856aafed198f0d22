"""The proxies that are compared, each with a configuration that makes it do the gateway's work and no more.

The client's certificate is verified and its lease looked up, no session is resumed, and a connection to the worker is
made for each of the client's. What a proxy cannot do it says, and is left out there.
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
"""The two ways on to a worker: in the clear on this machine, over TLS to a pod."""


@dataclass(frozen=True)
class Place:
    """Where a proxy stands in one measurement."""

    directory: Path
    """Its own."""
    pki: Pki
    leg: str
    socket: Path
    """The worker in the clear."""
    worker_port: int
    """The worker over TLS, on loopback."""
    connections: int
    """How many it must bear at once."""
    workers: int = 1
    """Processes, threads or event loops that share its work."""
    port: int = field(default_factory=free_port)


class Peer(Protocol):
    """One of the proxies."""

    @property
    def name(self) -> str:
        """As the table has it."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Added to that of its process."""

    def version(self) -> str:
        """What it says of itself. Raises FaultError if it isn't there."""

    def command(self, place: Place) -> list[str | Path]:
        """How it is started, with its configuration written.

        Raises:
            FaultError: It isn't there, or can't do this leg.
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
    """ghostunnel, built here. It has TLS on one side only, whichever way round it runs."""

    name = "ghostunnel"
    environment: Mapping[str, str] = {"GODEBUG": "tlsmlkem=0"}  # the others' OpenSSL has no post-quantum exchange

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
        return command + [f"--allow-cn=alloc:{token}" for token in place.pki.tokens]  # they lead nowhere but here


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
        """Of what its speed depends on."""
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
    """The proxy, listening.

    Raises:
        FaultError: It isn't there, can't do this leg, or does not start.
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
