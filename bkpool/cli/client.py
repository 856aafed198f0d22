"""The API's client, on the standard library alone so that a command starts fast.

It follows no redirect and uses no proxy: the bearer token goes to the endpoint of the user and nowhere else. The
admin's token goes to the local socket of the home's appliance only. credentials.py chooses the token.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from itertools import count
from threading import Timer
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from bkpool.cli import api_connection, api_errors, audience, console, credentials, endpoints, home
from bkpool.cli.places import where
from bkpool.cli.threads import in_thread
from bkpool.core import errors
from bkpool.core.errors import Unavailable
from bkpool.core.names import API_PORT, AUDIENCE

ANSWER_TIMEOUT = 30.0
"""Seconds, in addition to the time for which a call may wait by its nature."""
GIVE_UP_TIMEOUT = 5.0
"""Seconds for an answer after a signal. The server may have sent it already."""
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"})
"""How OpenSSL, by its version, calls an answer that is not TLS."""
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
        claims: Who the caller wants to be, where there is a development issuer.
        only_here: Calls the appliance that runs from this home, whatever $BKCTL_ENDPOINT says.
        answer_timeout: Seconds that each answer may take.
    """

    def __init__(
        self,
        claims: credentials.RequestedClaims | None = None,
        *,
        only_here: bool = False,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        """Finds the endpoint and the credential: first in the environment, then from the appliance that runs here.

        Raises:
            InvalidInput: An environment variable is not valid; the message names it.
        """
        self._answer_timeout = answer_timeout
        given = "" if only_here else os.environ.get("BKCTL_ENDPOINT", "")
        appliance = _running_here(needed=not given)
        own = endpoints.parse(appliance.api) if appliance else None
        url = endpoints.parse(given) if given else own or endpoints.parse(f"http://localhost:{API_PORT}")
        self._is_guess = not given and appliance is None
        self._is_local = own is not None and endpoints.same(url, own)
        self._credential = credentials.find(appliance, claims, local=self._is_local, audience=self.audience)
        # A user who names an endpoint and a token gets that endpoint. All else that is meant for the appliance here
        # goes over its socket, where nobody can listen in or answer in its place.
        chosen = bool(given) and credentials.explicit() is not None
        self._socket = appliance.socket if appliance and self._is_local and not chosen else None
        self._url = url
        self._address = endpoints.address(url, own)
        self.endpoint = str(self._socket or url.text)
        self._tls = None
        if url.scheme == "https" and self._socket is None:
            self._tls = api_connection.tls_context(appliance.described if appliance and self._is_local else {})
        if given and url.crosses_in_clear:
            console.note_once(
                f"warning: BKCTL_ENDPOINT: tokens cross the network in clear to {given}; use https:// if it can"
            )
        self._connection: http.client.HTTPConnection | None = None
        self._request_sent = False
        self._giving_up: Timer | None = None
        self._signals = count()
        """Of the current call."""
        if os.environ.get("BKCTL_ALLOW_NO_AUTH"):
            console.note("note: BKCTL_ALLOW_NO_AUTH is no longer needed: bkpool finds the local admin token itself.")

    def allocate(self, request: dict[str, Any], *, wait: float) -> dict[str, Any]:
        """Leases a worker; returns when it is ready, or fails after `wait` seconds."""
        gateway = endpoints.gateway(os.environ)
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

    def delete_pool(self, name: str, namespace: str, *, now: bool) -> dict[str, Any]:
        """Begins to delete a pool. With `now`, its builds are cut and its caches are not kept."""
        body = {"poolName": name, "namespace": namespace, "now": now}
        options = {**api_errors.OPTIONS, "poolName": "NAME"}
        return self._call("POST", "/api/v1/pools/delete", body, self._credential, options=options)

    def check(self, token: str, pool: str, namespace: str) -> dict[str, Any]:
        """Whether the bearer of a token may use a pool, and why. The admin of this machine gets more details."""
        body = {"token": token, "poolName": pool, "namespace": namespace}
        options = {**api_errors.OPTIONS, "token": "--token-file"}
        admin = credentials.admin() if self._socket else None
        return self._call("POST", "/api/v1/auth/check", body, admin, options=options)

    def audience(self) -> str:
        """What an ID token for this appliance must be made for: $BKCTL_AUDIENCE, else what the appliance says.

        Raises:
            InvalidInput: It asks for a token for another server.
        """
        if given := audience.given():
            return given
        try:
            wanted = self._call("GET", "/api/v1/audience", None, None).get("audience")
        except errors.NotFound:  # an appliance of an earlier version
            return AUDIENCE
        finally:
            self._request_sent = False  # the call that the token is for has not begun
        return audience.accepted(wanted, self._url.url, own=self._is_local)

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
            # Counted in one step: the second signal may arrive while the first is still handled.
            if next(self._signals) == 0:
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
        timeout: float | None = None,
        options: Mapping[str, str] = api_errors.OPTIONS,
    ) -> dict[str, Any]:
        """One call. If the credential is refused and there is a newer one, the call is repeated once."""
        self._begin_call()
        timeout = self._answer_timeout if timeout is None else timeout
        if credential and credential.only_local and self._socket is None:
            raise _no_local_socket()
        token = credential.bearer() if credential else None
        try:
            return self._exchange(method, path, body, timeout, token, options)
        except errors.Unauthenticated as error:
            self._begin_call()
            newer = credential.bearer(fresh=True) if credential else None
            if newer != token:
                return self._exchange(method, path, body, timeout, newer, options)
            if credential:
                error.hint = f"{error.hint} The token came from {credential.name}.".lstrip()
            raise

    def _begin_call(self) -> None:
        self._request_sent, self._giving_up, self._signals = False, None, count()

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
            before = "" if self._socket else self._url.path
            connection.request(method, before + path, json.dumps(body) if body is not None else None, headers)
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
        if self._socket is not None:
            dial = partial(api_connection.dial_local, self._socket, home.home())
            return api_connection.ApiConnection("localhost", http.client.HTTP_PORT, dial)
        dial = partial(api_connection.dial_tcp, self._address, self._url.port)
        return api_connection.ApiConnection(self._url.host, self._url.port, dial, self._tls)

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
        if self._is_guess:
            raise self._not_running(f"what answers at {self.endpoint} is another program")
        raise Unavailable(
            f"{self.endpoint} answered HTTP {status} in a form that is not that of bkpool's API",
            hint="Check that BKCTL_ENDPOINT names a bkpool appliance, and no proxy in front of it.",
        )

    def _unreachable(self, error: Exception) -> Unavailable:
        if isinstance(error, ssl.SSLError):
            hint = "Name the file with the CA to trust in BKCTL_TLS_CA_CERT."
            if error.reason in _NO_TLS:
                hint = "The server answers without TLS. If that is intended, write http:// in BKCTL_ENDPOINT."
            if not self._url.has_scheme:
                hint += " Without http:// before it, BKCTL_ENDPOINT means https."
            return Unavailable(
                f"no TLS connection to {self.endpoint}: {getattr(error, 'verify_message', '') or error.reason}",
                hint=hint,
            )
        if isinstance(error, socket.gaierror):
            return Unavailable(f"{self.endpoint}: there is no host of this name", hint="Check BKCTL_ENDPOINT.")
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            if self._is_guess:
                return Unavailable(
                    f"the appliance of this home ({home.home()}) is not running, and no appliance answers at "
                    f"{self.endpoint}",
                    hint="Start it with `bkpool up -d`, or set BKCTL_ENDPOINT.",
                )
            # It runs, or there were no socket. /run/user of a user goes with their last session.
            restart = "Restart it: `bkpool down`, then `bkpool up -d`."
            return Unavailable(
                f"no appliance answers at {self.endpoint}",
                hint=restart if self._socket else "Start it with `bkpool up -d`, or set BKCTL_ENDPOINT.",
            )
        if isinstance(error, ConnectionError | http.client.HTTPException | TimeoutError):
            return self._no_full_answer(late=isinstance(error, TimeoutError))
        return Unavailable(f"{self.endpoint} cannot be reached: {getattr(error, 'strerror', None) or error}")

    def _no_full_answer(self, *, late: bool) -> Unavailable:
        if self._is_guess:
            return self._not_running(f"another program listens at {self.endpoint}")
        if late:
            return Unavailable(f"{self.endpoint} did not answer in time", hint="`bkpool logs` shows its log.")
        return Unavailable(
            f"{self.endpoint} closed the connection without a full answer",
            hint="`bkpool logs` shows what the appliance did. If it has ended, start it with `bkpool up -d`.",
        )

    def _not_running(self, instead: str) -> Unavailable:
        return Unavailable(
            f"the appliance of this home ({home.home()}) is not running, and {instead}",
            hint="Start it: bkpool up -d --api-address 127.0.0.1:PORT, with a free port. Or set BKCTL_ENDPOINT.",
        )


def _running_here(*, needed: bool) -> home.Appliance | None:
    """The appliance of this home. Where it is not needed, a home that cannot be read is none."""
    try:
        return home.running()
    except errors.HostFault:
        if needed:
            raise
        return None


def _shut(sock: socket.socket | None, direction: int) -> None:
    """Closes one direction of a connection, or both. Does nothing if it is closed already."""
    if sock is not None:
        with suppress(OSError):
            # Not the method of ssl.SSLSocket: after that one, what arrives is not decrypted any more.
            socket.socket.shutdown(sock, direction)


def _no_local_socket() -> Unavailable:
    return Unavailable(
        "the appliance of this home has no local socket, because an older bkpool started it; the admin's token "
        "is sent nowhere else",
        hint="Restart it: bkpool down, then bkpool up -d. Or set BKCTL_TOKEN.",
    )
