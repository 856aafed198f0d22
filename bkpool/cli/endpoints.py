"""Reads the endpoint of an API that the user gives, and says how it is reached.

Pure. The name localhost never goes to a resolver: /etc/hosts, or a program that listens on the other address of that
name, would decide who gets a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from bkpool.core.errors import InvalidInput

_IN_CLUSTER = (".svc", ".svc.cluster.local")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SOURCE = "BKCTL_ENDPOINT"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an API is."""

    text: str
    """As the user wrote it."""
    scheme: str
    host: str
    """In lower case, an IPv6 address without brackets."""
    port: int
    path: str
    """What stands before the paths of the API; mostly empty."""

    @property
    def url(self) -> str:
        """The whole URL, with its scheme and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def has_scheme(self) -> bool:
        """Whether the user wrote one."""
        return "://" in self.text

    @property
    def is_loopback(self) -> bool:
        """Whether nothing that is sent there leaves this machine."""
        return is_loopback(self.host)

    @property
    def crosses_in_clear(self) -> bool:
        """Whether tokens cross a network in clear. A cluster's own Service, as in the contract, is not meant."""
        return self.scheme == "http" and not self.is_loopback and not self.host.rstrip(".").endswith(_IN_CLUSTER)


def parse(text: str) -> Endpoint:
    """The endpoint that BKCTL_ENDPOINT has. Without a scheme it means https, on loopback http.

    Raises:
        InvalidInput: It is not of the form http://host:port, or has more than that.
    """
    try:
        url = urlsplit(text if "://" in text else f"//{text}")
        host, port = url.hostname or "", url.port
        scheme = url.scheme or ("http" if is_loopback(host) else "https")
        valid = scheme in _DEFAULT_PORTS and bool(host) and port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InvalidInput(
            f"{_SOURCE}: {text[:80]!r} is not of the form http://host:port",
            hint="Write https://host:port, or http://127.0.0.1:port for this machine.",
            field=_SOURCE,
        )
    if url.username is not None or url.query or url.fragment or not text.isprintable() or " " in text:
        # Messages show the endpoint, so it must not have a password in it.
        raise InvalidInput(
            f"{_SOURCE}: has more than scheme, host, port and path",
            hint="Write http://host:port, and put the credential into BKCTL_TOKEN.",
            field=_SOURCE,
        )
    return Endpoint(text, scheme, host, port or _DEFAULT_PORTS[scheme], url.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Whether this is `localhost` or an address of loopback. Any other name may lead anywhere."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def same(one: Endpoint, own: Endpoint) -> bool:
    """Whether an endpoint is that of the own appliance, or is its loopback address under the name localhost."""
    if (one.scheme, one.port) != (own.scheme, own.port):
        return False
    return one.host == own.host or (one.host == "localhost" and own.is_loopback)


def address(endpoint: Endpoint, own: Endpoint | None) -> str:
    """The host to connect to: for `localhost` an address, for every other host the host itself.

    Args:
        endpoint: Where the call goes.
        own: The API of the appliance that runs here, as it told. Only this makes `localhost` mean ::1.
    """
    if endpoint.host != "localhost":
        return endpoint.host
    return "::1" if own is not None and own.host == "::1" and own.port == endpoint.port else "127.0.0.1"


def gateway(environ: Mapping[str, str]) -> str:
    """The endpoint of the gateway that the user gives in place of the answer's; empty if there is none.

    Raises:
        InvalidInput: buildx cannot connect to it.
    """
    given = environ.get("BKCTL_GATEWAY_ENDPOINT", "")
    try:
        url = urlsplit(given if "://" in given else f"tcp://{given}")
        bare = not (url.path or url.query or url.fragment or url.username is not None)
        valid = bare and url.scheme == "tcp" and bool(url.hostname) and bool(url.port)
    except ValueError:
        valid = False
    if given and not (valid and given.isprintable() and " " not in given):
        raise InvalidInput(
            f"BKCTL_GATEWAY_ENDPOINT: {given[:80]!r} is not of the form tcp://HOST:PORT",
            hint="Write it as in tcp://builds.example:1235.",
            field="BKCTL_GATEWAY_ENDPOINT",
        )
    return given
