"""The API's client, on the standard library alone so that a command starts fast.

It follows no redirect and uses no proxy: the bearer token goes where the user pointed and nowhere else, and the admin
token of this machine only to the appliance of this machine.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from bkpool.cli import console, home
from bkpool.core import errors
from bkpool.core.errors import BkpoolError, InvalidInput, Unavailable
from bkpool.core.names import API_PORT

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 30.0
"""Seconds beyond any time that a call may wait by its own nature."""
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_LONGEST = 16 << 20
"""Bytes of an answer that are read at most: a thousand workers take one or two MiB."""


class Client:
    """One caller of one appliance; each call is a connection of its own.

    Args:
        endpoint: Which appliance; by default the environment decides, else the one that runs here.
    """

    def __init__(self, endpoint: str = "") -> None:
        """Finds the endpoint and the credential: environment first, then the appliance that runs here.

        Raises:
            InvalidInput: A variable of the environment is no good; the message names it.
        """
        appliance = home.running()
        given = endpoint or os.environ.get("BKCTL_ENDPOINT", "")
        self.endpoint = given or (appliance.api if appliance else f"http://localhost:{API_PORT}")
        self._url = _parsed(self.endpoint)
        self._token = _bearer(self._url, appliance)
        self._tls = _tls_context() if self._url.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None
        self._asked = False
        if os.environ.get("BKCTL_ALLOW_NO_AUTH"):
            console.note(
                "note: BKCTL_ALLOW_NO_AUTH is not needed any more: the local admin token is found by itself."
            )

    def allocate(self, request: dict[str, Any], *, wait: float) -> dict[str, Any]:
        """Leases a worker; returns when it is ready, or fails after `wait` seconds."""
        lease = self._call("POST", "/api/v1/workers/allocate", request, timeout=wait + ANSWER_TIMEOUT)
        if gateway := os.environ.get("BKCTL_GATEWAY_ENDPOINT"):
            lease["gatewayEndpoint"] = gateway
        return lease

    def renew(self, token: str, ttl: str) -> dict[str, Any]:
        """Lets a lease run for `ttl` (a Go duration) from now."""
        return self._call("POST", "/api/v1/workers/renew", {"token": token, "ttl": ttl})

    def release(self, token: str) -> dict[str, Any]:
        """Gives a worker back."""
        return self._call("POST", "/api/v1/workers/release", {"token": token})

    def pools(self) -> dict[str, Any]:
        """All pools."""
        return self._call("GET", "/api/v1/pools")

    def pool(self, name: str, namespace: str) -> dict[str, Any]:
        """One pool with its workers."""
        return self._call("GET", f"/api/v1/pools/{quote(name, safe='')}?{urlencode({'namespace': namespace})}")

    def hang_up(self) -> bool:
        """Tells the server that nobody waits any more; for a signal handler. False: nothing was asked yet.

        Only our direction is closed: an answer that is under way already still arrives, so that a lease in it can be
        released, instead of being left to run out.
        """
        sock = self._connection.sock if self._connection else None
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        return self._asked

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = ANSWER_TIMEOUT
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json", "Connection": "close"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = self._connection = self._connect()
        try:
            connection.connect()
            self._asked = True
            connection.sock.settimeout(timeout)
            connection.request(
                method, self._url.path.rstrip("/") + path, json.dumps(body) if body is not None else None, headers
            )
            response = connection.getresponse()
            answer = response.read(_LONGEST)
            if response.length:  # read(n) is content with less
                raise http.client.IncompleteRead(answer, response.length)
            return self._read(response.status, answer)
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port or http.client.HTTP_PORT, timeout=CONNECT_TIMEOUT)
        return http.client.HTTPSConnection(
            host, port or http.client.HTTPS_PORT, timeout=CONNECT_TIMEOUT, context=self._tls
        )

    def _read(self, status: int, body: bytes) -> dict[str, Any]:
        try:
            told = json.loads(body)
        except ValueError:
            told = None
        if status == HTTPStatus.OK and isinstance(told, dict):
            return told
        why = told.get("error") if isinstance(told, dict) else None
        if isinstance(why, dict) and isinstance(why.get("message"), str):
            raise self._error(status, why)
        raise Unavailable(
            f"{self.endpoint} answered HTTP {status} in a form that bkpool's API does not have",
            hint="Does BKCTL_ENDPOINT point to a bkpool appliance, or to a proxy before it?",
        )

    def _error(self, status: int, why: dict[str, Any]) -> BkpoolError:
        """The error that the server raised, of the same class."""
        classes = {kind.__name__: kind for kind in BkpoolError.__subclasses__()}
        by_status: dict[int, type[BkpoolError]] = {
            kind.status: kind for kind in classes.values() if kind is not errors.HostFault
        }
        code = str(why.get("code") or "")
        kind = classes.get(code) or by_status.get(status, BkpoolError)
        hint = str(why.get("hint") or "")
        if kind is errors.Unauthenticated and not self._token:
            hint = "Set BKCTL_TOKEN; only the appliance of this machine is called without it."
        return kind(
            why["message"],
            hint=hint,
            code=code or None,
            exit_code=errors.EXIT.get(code),
            field=why.get("field"),
            retry_after=why.get("retryAfter"),
        )

    def _unreachable(self, error: Exception) -> Unavailable:
        if isinstance(error, ssl.SSLError):
            return Unavailable(
                f"no TLS connection to {self.endpoint}: {getattr(error, 'verify_message', '') or error.reason}",
                hint="BKCTL_TLS_CA_CERT names the file with the CA to trust.",
            )
        if isinstance(error, TimeoutError):
            return Unavailable(f"{self.endpoint} did not answer in time", hint="Look at its log: `bkpool logs`.")
        if isinstance(error, socket.gaierror):
            return Unavailable(f"{self.endpoint}: there is no host of this name", hint="Check BKCTL_ENDPOINT.")
        if isinstance(error, ConnectionRefusedError):
            return Unavailable(
                f"no appliance answers at {self.endpoint}",
                hint="Start it with `bkpool up -d`, or set BKCTL_ENDPOINT.",
            )
        if isinstance(error, ConnectionError | http.client.HTTPException):
            return Unavailable(
                f"{self.endpoint} closed the connection without a full answer",
                hint="`bkpool status` shows whether the appliance still runs, `bkpool logs` what it did.",
            )
        return Unavailable(f"{self.endpoint} cannot be reached: {getattr(error, 'strerror', None) or error}")


def _parsed(endpoint: str) -> SplitResult:
    problem = "is not of the form http://host:port"
    try:
        url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        valid = url.scheme in {"http", "https"} and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        valid = False
    if valid and (
        url.username is not None or url.query or url.fragment or not endpoint.isprintable() or " " in endpoint
    ):
        # The endpoint is shown in messages: a password must not stand in it.
        raise InvalidInput(
            "BKCTL_ENDPOINT: has more in it than scheme, host, port and path",
            hint="Write http://host:port; the credential belongs into BKCTL_TOKEN.",
            field="BKCTL_ENDPOINT",
        )
    if not valid:
        raise InvalidInput(f"BKCTL_ENDPOINT: {endpoint[:80]!r} {problem}", hint="Correct it.", field="BKCTL_ENDPOINT")
    return url


def _bearer(url: SplitResult, appliance: home.Appliance | None) -> str | None:
    """BKCTL_TOKEN wherever the user points; the admin token only to the appliance that runs from this home."""
    given = os.environ.get("BKCTL_TOKEN", "").strip()
    if given:
        if not (given.isascii() and given.isprintable() and " " not in given):
            raise InvalidInput(
                "BKCTL_TOKEN: has characters in it that no bearer token has",
                hint="Set it to the token alone, without quotes or line ends.",
                field="BKCTL_TOKEN",
            )
        return given
    if appliance is None:
        return None
    own = urlsplit(appliance.api)
    same = url.port == own.port and url.scheme == own.scheme
    near = url.hostname == own.hostname or {url.hostname, own.hostname} <= _LOOPBACK
    return home.admin_token() if same and near else None


def _tls_context() -> ssl.SSLContext:
    ca = os.environ.get("BKCTL_TLS_CA_CERT") or None
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidInput(
            f"BKCTL_TLS_CA_CERT: {ca!r} is not a readable file of PEM certificates ({error.strerror or error})",
            hint="Name the file with the CA's certificate.",
            field="BKCTL_TLS_CA_CERT",
        ) from None
    if _flag("BKCTL_TLS_SKIP_VERIFY"):
        console.note("note: BKCTL_TLS_SKIP_VERIFY is set: whoever answers is believed to be the appliance.")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _flag(variable: str) -> bool:
    value = os.environ.get(variable, "").lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"", "0", "false", "no", "off"}:
        return False
    raise InvalidInput(
        f"{variable}: {value[:40]!r} is neither true nor false", hint="Set it to 1 or 0.", field=variable
    )
