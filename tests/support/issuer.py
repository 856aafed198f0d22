"""An issuer of OIDC tokens for tests: a real HTTP server on loopback that signs any token a test asks for.

It runs in a thread with a loop of its own, so that plain and async tests and other processes can use it. What it
answers can be bent, and it remembers what it was asked.

    with Issuer() as issuer:
        token = issuer.token(sub="ann", repository="org/repo")
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from typing import Any, Self

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from jwt.algorithms import get_default_algorithms

from support.rsa_keys import rsa_key

AUDIENCE = "buildkit-controller"
DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/jwks"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True)
class SigningKey:
    """A private key with its name."""

    kid: str | None
    alg: str
    private: Any

    def sign(self, text: str) -> str:
        return b64(get_default_algorithms()[self.alg].sign(text.encode(), self.private))

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key, as the issuer publishes it."""
        public = get_default_algorithms()[self.alg].to_jwk(self.private.public_key(), as_dict=True)
        public.pop("key_ops", None)
        named = {} if self.kid is None else {"kid": self.kid}
        return {**public, **named, "use": "sig", "alg": self.alg}


@cache
def signing_key(kid: str | None = "key-1", alg: str = "RS256", bits: int = 2048) -> SigningKey:
    """Returns the same key for the same name."""
    if alg.startswith("RS"):
        return SigningKey(kid, alg, rsa_key(bits))
    curves: dict[str, type[ec.SECP256R1 | ec.SECP384R1 | ec.SECP256K1]] = {
        "ES256": ec.SECP256R1,
        "ES384": ec.SECP384R1,
        "ES256K": ec.SECP256K1,
    }
    if alg in curves:
        return SigningKey(kid, alg, ec.generate_private_key(curves[alg]()))
    return SigningKey(kid, alg, ed25519.Ed25519PrivateKey.generate())


def forge(header: dict[str, Any] | bytes, claims: dict[str, Any] | bytes, key: SigningKey | None) -> str:
    """Returns a compact JWT of exactly this header and these claims (objects or bytes).

    Without a key it is not signed.
    """
    parts = [b64(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in (header, claims)]
    text = ".".join(parts)
    return f"{text}.{key.sign(text) if key else ''}"


class HeldAnswer:
    """Holds a request until `open` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._open = loop, asyncio.Event()
        self.reached = threading.Event()
        """Set when a request is held."""

    async def passed(self) -> None:
        self.reached.set()
        await self._open.wait()

    def open(self) -> None:
        self._loop.call_soon_threadsafe(self._open.set)


class Issuer:
    """See the module. It keeps its address when it is stopped and started again."""

    def __init__(self, *, port: int = 0, path: str = "", key: SigningKey | None = None) -> None:
        self.port, self.path = port, path
        self._first = key or signing_key()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.reset()

    def reset(self) -> None:
        """Restores the initial state. The server continues to run."""
        self._answer_what_was_sent()
        self.keys = [self._first]
        """The published keys. The first one signs."""
        self.answers: dict[str, Handler] = {}
        """By path: the handler that answers instead."""
        self.requests: list[web.BaseRequest] = []
        """The paths of all requests."""

    def _answer_what_was_sent(self) -> None:
        """Waits until the server has seen the requests of earlier tests, also those that nobody waits for any more.

        Connections are accepted in their order. So the first answer shows that those of before are accepted and read;
        the second one is of a later turn of the loop, in which their handlers have begun.
        """
        for _ in range(2 if self._thread is not None else 0):
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
                connection.request("GET", "/")
                connection.getresponse().read()

    # --- tokens ---------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def claims(self, **claims: Any) -> dict[str, Any]:
        """Returns the claims of a valid token with these changes; None leaves a claim out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "ann", "iat": now, "exp": now + 300}
        return {name: value for name, value in {**good, **claims}.items() if value is not None}

    def token(self, *, key: SigningKey | None = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """Returns a token, which is valid without arguments.

        Args:
            key: What signs; the issuer's own if not given.
            header: Members of the header to add or replace; None leaves one out.
            claims: As `claims` takes them.
        """
        key = key or self.keys[0]
        whole = {"typ": "JWT", "alg": key.alg, "kid": key.kid, **(header or {})}
        return forge({k: v for k, v in whole.items() if v is not None}, self.claims(**claims), key)

    def rotate(self, kid: str, alg: str = "RS256", *, keep: bool = False) -> SigningKey:
        """Signs with another key from now on, and publishes it; with `keep` also the older ones."""
        key = signing_key(kid, alg)
        self.keys = [key, *(self.keys if keep else [])]
        return key

    # --- answers --------------------------------------------------------------------------------------------------

    def count(self, path: str = JWKS) -> int:
        """Returns how often this path was requested."""
        return sum(request.path == self.path + path for request in self.requests)

    def discovery(self, **changes: Any) -> dict[str, Any]:
        return {"issuer": self.url, "jwks_uri": f"{self.url}{JWKS}", **changes}

    def jwks(self) -> dict[str, Any]:
        return {"keys": [key.jwk for key in self.keys]}

    def answer(self, path: str, body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answers with this from now on: an object as JSON, or bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def handler(request: web.Request) -> web.Response:
            return web.Response(body=data, status=status, headers=headers, content_type="application/json")

        self.answers[path] = handler

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.answer(path, b"", status=status, headers={"Location": to})

    def hang(self, path: str) -> None:
        """Never answers requests for this path."""

        async def handler(request: web.Request) -> web.Response:
            await asyncio.Event().wait()
            return web.Response()

        self.answers[path] = handler

    def flood(self, path: str, megabytes: int = 10) -> list[int]:
        """Answers with a body of this size, without a Content-Length. The list gets the MiB that were really sent."""
        sent: list[int] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            with suppress(ConnectionError):
                for number in range(megabytes):
                    await response.write(b" " * (1 << 20))
                    sent.append(number)
            return response

        self.answers[path] = handler
        return sent

    def hold(self, path: str) -> HeldAnswer:
        """Holds the next answer until the result is opened. The answer has the state at the time of the request."""
        assert self._loop is not None
        held = HeldAnswer(self._loop)

        async def handler(request: web.Request) -> web.StreamResponse:
            del self.answers[path]
            response = await self._handle(request)
            await held.passed()
            return response

        self.answers[path] = handler
        return held

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix(self.path)
        if path in self.answers:
            return await self.answers[path](request)
        if path == DISCOVERY:
            return web.json_response(self.discovery())
        if path == JWKS:
            return web.json_response(self.jwks())
        return web.Response(status=404)

    async def _remember(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self._handle(request)

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listening)), name="issuer")
        self._thread.start()
        assert listening.wait(60), "the issuer does not come up"
        return self

    def stop(self) -> None:
        """Stops listening at the address."""
        if self._thread is None or self._loop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the issuer does not end"
        self._thread = None

    async def _serve(self, listening: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._remember)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.01)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self.port = runner.addresses[0][1]
            listening.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
