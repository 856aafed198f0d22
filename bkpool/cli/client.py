"""The API's client, on the standard library alone so that a command starts fast.

It follows no redirect and uses no proxy: the bearer token goes where the user pointed and nowhere else. Which token
that is, is said in credentials.py.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from bkpool.cli import console, credentials, home
from bkpool.core import errors
from bkpool.core.errors import BkpoolError, InvalidInput, Unavailable
from bkpool.core.names import API_PORT

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 30.0
"""Seconds beyond any time that a call may wait by its own nature."""
_LONGEST = 16 << 20
"""Bytes of an answer that are read at most: a thousand workers take one or two MiB."""


class NamedLease(NamedTuple):
    """A lease by its worker, for its holder. The fields are the API's."""

    workerName: str  # noqa: N815
    namespace: str


Lease = str | NamedLease
"""By its token, or by its worker."""


class Client:
    """One caller of one appliance; each call is a connection of its own.

    Args:
        endpoint: Which appliance; by default the environment decides, else the one that runs here.
        asked: Who the caller wants to be, where there is a development issuer.
    """

    def __init__(self, endpoint: str = "", asked: credentials.Asked | None = None) -> None:
        """Finds the endpoint and the credential: environment first, then the appliance that runs here.

        Raises:
            InvalidInput: A variable of the environment is no good; the message names it.
        """
        appliance = home.running()
        given = endpoint or os.environ.get("BKCTL_ENDPOINT", "")
        self.endpoint = given or (appliance.api if appliance else f"http://localhost:{API_PORT}")
        self._url = _parsed(self.endpoint)
        self._own = appliance is not None and appliance.is_at(self._url)
        self._credential = credentials.find(appliance, asked, own=self._own)
        self._tls = _tls_context(appliance if self._own else None) if self._url.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None
        self._asked = False
        if os.environ.get("BKCTL_ALLOW_NO_AUTH"):
            console.note(
                "note: BKCTL_ALLOW_NO_AUTH is not needed any more: the local admin token is found by itself."
            )

    def allocate(self, request: dict[str, Any], *, wait: float) -> dict[str, Any]:
        """Leases a worker; returns when it is ready, or fails after `wait` seconds."""
        lease = self._call(
            "POST", "/api/v1/workers/allocate", request, self._credential, timeout=wait + ANSWER_TIMEOUT
        )
        if gateway := os.environ.get("BKCTL_GATEWAY_ENDPOINT"):
            lease["gatewayEndpoint"] = gateway
        return lease

    def renew(self, lease: Lease, ttl: str) -> dict[str, Any]:
        """Lets a lease run for `ttl` (a Go duration) from now."""
        return self._change("renew", lease, {"ttl": ttl})

    def release(self, lease: Lease) -> dict[str, Any]:
        """Gives a worker back."""
        return self._change("release", lease, {})

    def check(self, token: str, pool: str, namespace: str) -> dict[str, Any]:
        """Whether the bearer of a token may use a pool, and why; this machine's admin is told more than others."""
        body = {"token": token, "poolName": pool, "namespace": namespace}
        return self._call("POST", "/api/v1/auth/check", body, credentials.admin() if self._own else None)

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
        """Tells the server that nobody waits any more; for a signal handler. False: nothing was asked yet.

        Only our direction is closed: an answer that is under way already still arrives, so that a lease in it can be
        released, instead of being left to run out.
        """
        sock = self._connection.sock if self._connection else None
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        return self._asked

    def _change(self, verb: str, lease: Lease, more: dict[str, Any]) -> dict[str, Any]:
        """A lease's token is itself the right to change it: who has it is asked for no other."""
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
    ) -> dict[str, Any]:
        """One call. Where the credential is refused and there is a newer one, the call is made again, once."""
        token = credential.bearer() if credential else None
        try:
            return self._exchange(method, path, body, timeout, token)
        except errors.Unauthenticated as error:
            newer = credential.bearer(anew=True) if credential else None
            if newer != token:
                return self._exchange(method, path, body, timeout, newer)
            if credential:
                error.hint = f"{error.hint} The token was that of {credential.name}.".lstrip()
            raise

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float, token: str | None
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json", "Connection": "close"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
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
        if kind is errors.Unauthenticated and not self._credential:
            hint = credentials.without_one(os.environ)
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


def _tls_context(own: home.Appliance | None) -> ssl.SSLContext:
    """Who must prove to be the appliance: one of this home says by itself whom to trust."""
    told = own.described if own else {}
    given, pinned = os.environ.get("BKCTL_TLS_CA_CERT"), told.get("apiCert")
    ca = given or told.get("apiCa")
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
        console.note("note: BKCTL_TLS_SKIP_VERIFY is set: whoever answers is believed to be the appliance.")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _pinned(file: Path) -> ssl.SSLContext:
    """Only the very certificate that the appliance here was given, by whatever name it is called."""
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
