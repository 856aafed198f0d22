"""The API's client, on the standard library alone so that a command starts fast.

It follows no redirect and uses no proxy: the bearer token goes to the endpoint of the user and nowhere else.
credentials.py chooses the token.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from bkpool.cli import api_errors, console, credentials, home
from bkpool.cli.places import where
from bkpool.cli.threads import in_thread
from bkpool.core import errors
from bkpool.core.errors import InvalidInput, Unavailable
from bkpool.core.names import API_PORT

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 30.0
"""Seconds, in addition to the time for which a call may wait by its nature."""
GIVE_UP_TIMEOUT = 5.0
"""Seconds for an answer after a signal. The server may have sent it already."""
_MAX_ANSWER = 16 << 20  # bytes: an answer about a thousand workers has one or two MiB


class NamedLease(NamedTuple):
    """A lease named by its worker, for the caller who made it. The fields have the names of the API."""

    workerName: str  # noqa: N815
    namespace: str


LeaseReference = str | NamedLease
"""A lease by its token, or by its worker."""


class Client:
    """One caller of one appliance. Each call uses a new connection.

    Args:
        endpoint: The appliance; by default $BKCTL_ENDPOINT, else the appliance that runs here.
        claims: Who the caller wants to be, where there is a development issuer.
    """

    def __init__(self, endpoint: str = "", claims: credentials.RequestedClaims | None = None) -> None:
        """Finds the endpoint and the credential: first in the environment, then from the appliance that runs here.

        Raises:
            InvalidInput: An environment variable is not valid; the message names it.
        """
        appliance = home.running()
        given = endpoint or os.environ.get("BKCTL_ENDPOINT", "")
        self._is_guess = not given and appliance is None
        self.endpoint = given or (appliance.api if appliance else f"http://localhost:{API_PORT}")
        self._url = _parsed(self.endpoint)
        self._is_local = appliance is not None and appliance.is_at(self._url)
        self._credential = credentials.find(appliance, claims, local=self._is_local)
        self._tls = _tls_context(appliance if self._is_local else None) if self._url.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None
        self._request_sent = False
        self._giving_up: Timer | None = None
        if os.environ.get("BKCTL_ALLOW_NO_AUTH"):
            console.note("note: BKCTL_ALLOW_NO_AUTH is no longer needed: bkpool finds the local admin token itself.")

    def allocate(self, request: dict[str, Any], *, wait: float) -> dict[str, Any]:
        """Leases a worker; returns when it is ready, or fails after `wait` seconds."""
        gateway = _given_gateway()
        lease = self._call(
            "POST", "/api/v1/workers/allocate", request, self._credential, timeout=wait + ANSWER_TIMEOUT
        )
        if gateway:
            lease["gatewayEndpoint"] = gateway
        return lease

    def renew(self, lease: LeaseReference, ttl: str) -> dict[str, Any]:
        """Sets the end of a lease to `ttl` (a Go duration) from now."""
        return self._change("renew", lease, {"ttl": ttl})

    def release(self, lease: LeaseReference, *, now: bool = False) -> dict[str, Any]:
        """Ends a lease. With `now`, its connections and builds are cut."""
        return self._change("release", lease, {"now": True} if now else {})

    def revoke(self, selection: dict[str, str]) -> dict[str, Any]:
        """Ends the leases that the body of the call selects, and cuts their connections and builds."""
        return self._call("POST", "/api/v1/workers/revoke", selection, self._credential)

    def check(self, token: str, pool: str, namespace: str) -> dict[str, Any]:
        """Whether the bearer of a token may use a pool, and why. The admin of this machine gets more details."""
        body = {"token": token, "poolName": pool, "namespace": namespace}
        options = {**api_errors.OPTIONS, "token": "--token-file"}
        admin = credentials.admin() if self._is_local else None
        return self._call("POST", "/api/v1/auth/check", body, admin, options=options)

    def pools(self) -> dict[str, Any]:
        """All pools."""
        return self._call("GET", "/api/v1/pools", None, self._credential)

    def issuers(self) -> dict[str, Any]:
        """The configured issuers of callers' tokens."""
        return self._call("GET", "/api/v1/issuers", None, self._credential)

    def pool(self, name: str, namespace: str) -> dict[str, Any]:
        """One pool with its workers."""
        path = f"/api/v1/pools/{quote(name, safe='')}?{urlencode({'namespace': namespace})}"
        return self._call("GET", path, None, self._credential)

    def hang_up(self) -> bool:
        """Tells the server that nobody waits any more, and gives up. For the handler of a signal.

        Only the direction to the server is closed. An answer that was already sent still arrives, so that a lease in
        it can be released and does not remain until it expires.

        Returns:
            Whether a request was sent. If not, there is no lease to lose.
        """
        if self._request_sent and self._connection is not None:
            _shut(self._connection.sock, socket.SHUT_WR)
        return self.give_up()

    def give_up(self) -> bool:
        """Ends the wait for the answer after GIVE_UP_TIMEOUT; the second time, at once. For the handler of a signal.

        Returns:
            Whether a request was sent. If not, the call goes on.
        """
        if self._request_sent and self._connection is not None:
            if self._giving_up is None:
                self._giving_up = Timer(GIVE_UP_TIMEOUT, _shut, (self._connection.sock, socket.SHUT_RDWR))
                self._giving_up.daemon = True
                self._giving_up.start()
            else:
                _shut(self._connection.sock, socket.SHUT_RDWR)
        return self._request_sent

    def _change(self, verb: str, lease: LeaseReference, more: dict[str, Any]) -> dict[str, Any]:
        """Renews or releases. With the token of the lease no other credential is needed."""
        path = f"/api/v1/workers/{verb}"
        if isinstance(lease, str):
            return self._call("POST", path, {"token": lease, **more}, None)
        return self._call("POST", path, {**lease._asdict(), **more}, self._credential)

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        credential: credentials.Credential | None,
        *,
        timeout: float = ANSWER_TIMEOUT,
        options: Mapping[str, str] = api_errors.OPTIONS,
    ) -> dict[str, Any]:
        """One call. If the credential is refused and there is a newer one, the call is repeated once."""
        self._request_sent, self._giving_up = False, None
        token = credential.bearer() if credential else None
        try:
            return self._exchange(method, path, body, timeout, token, options)
        except errors.Unauthenticated as error:
            self._request_sent, self._giving_up = False, None
            newer = credential.bearer(fresh=True) if credential else None
            if newer != token:
                return self._exchange(method, path, body, timeout, newer, options)
            if credential:
                error.hint = f"{error.hint} The token came from {credential.name}.".lstrip()
            raise

    def _exchange(  # noqa: PLR0917 - private, and called in one place
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout: float,
        token: str | None,
        options: Mapping[str, str],
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json", "Connection": "close"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = self._connection = self._connect()
        try:
            in_thread(connection.connect)  # no signal interrupts the look-up of the name
            self._request_sent = True
            connection.sock.settimeout(timeout)
            connection.request(
                method, self._url.path.rstrip("/") + path, json.dumps(body) if body is not None else None, headers
            )
            response = connection.getresponse()
            answer = response.read(_MAX_ANSWER)
            if response.length:  # read(n) may return less without an error
                raise http.client.IncompleteRead(answer, response.length)
            return self._read(response.status, answer, options)
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            if self._giving_up is not None:
                self._giving_up.cancel()
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port or http.client.HTTP_PORT, timeout=CONNECT_TIMEOUT)
        return http.client.HTTPSConnection(
            host, port or http.client.HTTPS_PORT, timeout=CONNECT_TIMEOUT, context=self._tls
        )

    def _read(self, status: int, body: bytes, options: Mapping[str, str]) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == HTTPStatus.OK and isinstance(answer, dict):
            return answer
        why = answer.get("error") if isinstance(answer, dict) else None
        if isinstance(why, dict) and isinstance(why.get("message"), str):
            typed = {field: where(option) for field, option in options.items()}
            error = api_errors.error_of(status, why, typed)
            if isinstance(error, errors.Unauthenticated) and not self._credential:
                other = self.endpoint if self._is_guess else ""
                error.hint = credentials.hint_without_credential(os.environ, other_home=other)
            raise error
        raise Unavailable(
            f"{self.endpoint} answered HTTP {status} in a form that is not that of bkpool's API",
            hint="Check that BKCTL_ENDPOINT names a bkpool appliance, and no proxy in front of it.",
        )

    def _unreachable(self, error: Exception) -> Unavailable:
        if isinstance(error, ssl.SSLError):
            return Unavailable(
                f"no TLS connection to {self.endpoint}: {getattr(error, 'verify_message', '') or error.reason}",
                hint="Name the file with the CA to trust in BKCTL_TLS_CA_CERT.",
            )
        if isinstance(error, TimeoutError):
            return Unavailable(f"{self.endpoint} did not answer in time", hint="`bkpool logs` shows its log.")
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
                hint="`bkpool logs` shows what the appliance did. If it has ended, start it with `bkpool up -d`.",
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
        # Messages show the endpoint, so it must not have a password in it.
        raise InvalidInput(
            "BKCTL_ENDPOINT: has more than scheme, host, port and path",
            hint="Write http://host:port, and put the credential into BKCTL_TOKEN.",
            field="BKCTL_ENDPOINT",
        )
    if not valid:
        raise InvalidInput(
            f"BKCTL_ENDPOINT: {endpoint[:80]!r} {problem}", hint="Write http://host:port.", field="BKCTL_ENDPOINT"
        )
    return url


def _given_gateway() -> str:
    """The endpoint of the gateway that the user gives in place of the answer's; empty if there is none.

    Raises:
        InvalidInput: buildx cannot connect to it.
    """
    given = os.environ.get("BKCTL_GATEWAY_ENDPOINT", "")
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


def _shut(sock: socket.socket | None, direction: int) -> None:
    """Closes one direction of a connection, or both. Does nothing if it is closed already."""
    if sock is not None:
        with suppress(OSError):
            # Not the method of ssl.SSLSocket: after that one, what arrives is not decrypted any more.
            socket.socket.shutdown(sock, direction)


def _tls_context(own: home.Appliance | None) -> ssl.SSLContext:
    """The TLS settings of calls. An appliance of this home has recorded which certificate or CA to trust."""
    described = own.described if own else {}
    given, pinned = os.environ.get("BKCTL_TLS_CA_CERT"), described.get("apiCert")
    ca = given or described.get("apiCa")
    try:
        context = _pinned(Path(pinned)) if pinned and not given else ssl.create_default_context(cafile=ca or None)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        source = "BKCTL_TLS_CA_CERT" if given or not own else "appliance.json"
        raise InvalidInput(
            f"{source}: {ca or pinned!r} is not a readable file of PEM certificates "
            f"({getattr(error, 'strerror', None) or error})",
            hint="Name the file with the CA's certificate in BKCTL_TLS_CA_CERT.",
            field=source,
        ) from None
    if _flag("BKCTL_TLS_SKIP_VERIFY"):
        console.note("note: BKCTL_TLS_SKIP_VERIFY is set: any server that answers is taken for the appliance.")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _pinned(file: Path) -> ssl.SSLContext:
    """Trusts only the certificate that the appliance here was given, under any name."""
    first, end, _ = file.read_text("ascii", "replace").partition("-----END CERTIFICATE-----")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=first + end)
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
