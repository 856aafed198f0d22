"""The public keys of OIDC issuers: fetched when they are needed, cached for a while, and never fetched often.

Only configured issuers are asked, so a caller cannot make the appliance call an address of their choice. Time and
size of every response are limited, and jwks.py checks its contents. No token ever comes here.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import aiohttp
import structlog
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver
from jwt import PyJWK

from bkpool.core.errors import Unauthenticated, Unavailable
from bkpool.identity.jwks import PublicKey, choose, read_discovery, read_keys
from bkpool.identity.jwt import shown

log = structlog.get_logger(__name__)

FRESH_SECONDS = 600.0
"""For this long, cached keys are used without asking the issuer again."""
STALE_SECONDS = 3600.0
"""For this long, cached keys are used while the issuer cannot be reached."""
RETRY_SECONDS = 10.0
"""Time between two attempts to reach an issuer that failed, and between two searches for a key that was missing."""

_TIMEOUT = 5.0  # seconds for both documents together, redirects included
_MOST_BYTES = 512 << 10  # of one document; the largest known ones, with certificates, have some 30 KiB
_MOST_REDIRECTS = 2
_MOST_ISSUERS = 1000
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(slots=True)
class _CachedKeys:
    """The cached keys of one issuer. Times are those of the clock."""

    keys: tuple[PublicKey, ...] = ()
    fetched_at: float = -math.inf
    failure: str = ""
    """Why the last attempt failed; empty if it succeeded."""
    failed_at: float = -math.inf
    searched_at: float = -math.inf
    """When the issuer was last asked because a key was missing."""
    request: asyncio.Task[None] | None = None
    """The request that is running now."""


class IssuerKeys:
    """The keys of all issuers. Used in one event loop.

    Args:
        clock: Monotonic seconds.
        timeout: Seconds that an issuer has to respond.
        fresh: For this many seconds, cached keys are used without asking the issuer again.
        stale: For this many seconds, they are used while the issuer cannot be reached.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        timeout: float = _TIMEOUT,
        fresh: float = FRESH_SECONDS,
        stale: float = STALE_SECONDS,
    ) -> None:
        self._clock = clock
        self._timeout = timeout
        self._fresh = fresh
        self._stale = stale
        self._cache: dict[str, _CachedKeys] = {}
        self._requests: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def key(self, issuer: str, kid: str | None, alg: str) -> PyJWK:
        """The key of a configured issuer that a token names.

        Raises:
            Unauthenticated: The issuer has no such key.
            Unavailable: It cannot be reached, or its response is not usable.
        """
        cached = await self._usable(issuer)
        if (found := choose(cached.keys, kid, alg)) is not None:
            return found
        # The key may be new. But invented key names must not flood the issuer.
        if self._clock() - cached.searched_at >= RETRY_SECONDS:
            cached.searched_at = self._clock()
            await self._refresh(issuer, cached)
        elif cached.request is not None:
            await asyncio.shield(cached.request)
        if (found := choose(cached.keys, kid, alg)) is not None:
            return found
        if cached.failure:
            raise _unavailable(issuer, cached)
        which = "exactly one key" if kid is None else f"a key {shown(kid)}"
        raise Unauthenticated(f"{issuer} does not have {which} for {alg}")

    async def probe(self, issuer: str) -> int:
        """The number of usable keys of an issuer.

        Raises:
            Unavailable: The last attempt to reach it failed, even if older keys are still cached.
        """
        cached = await self._usable(issuer)
        if cached.failure:
            await self._refresh(issuer, cached)
        if cached.failure:
            raise _unavailable(issuer, cached)
        return len(cached.keys)

    async def close(self) -> None:
        """Cancels running requests and closes the session."""
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _usable(self, issuer: str) -> _CachedKeys:
        """The keys of an issuer that may be used now. Raises Unavailable."""
        cached = self._cache.pop(issuer, None) or _CachedKeys()
        self._cache[issuer] = cached  # moved to the end: the least recently used is removed first
        while len(self._cache) > _MOST_ISSUERS:
            del self._cache[next(iter(self._cache))]
        if self._clock() - cached.fetched_at >= self._fresh:
            await self._refresh(issuer, cached)
        if self._clock() - cached.fetched_at >= self._stale:
            raise _unavailable(issuer, cached)
        return cached

    async def _refresh(self, issuer: str, cached: _CachedKeys) -> None:
        """Asks the issuer, or waits for a request that runs already. Never raises.

        It does nothing if a request failed a moment ago.
        """
        if cached.request is None:
            if self._clock() - cached.failed_at < RETRY_SECONDS:
                return
            cached.request = asyncio.create_task(self._request(issuer, cached), name=f"keys of {issuer}")
            self._requests.add(cached.request)
            cached.request.add_done_callback(self._requests.discard)
        await asyncio.shield(cached.request)  # a cancelled caller must not cancel it for the others

    async def _request(self, issuer: str, cached: _CachedKeys) -> None:
        try:
            cached.keys = await self._fetch(issuer)
            cached.fetched_at, cached.failure, cached.failed_at = self._clock(), "", -math.inf
        except Unavailable as error:
            cached.failure, cached.failed_at = error.message, self._clock()
            log.warning("issuer.unavailable", issuer=issuer, reason=error.message)
        finally:
            cached.request = None

    async def _fetch(self, issuer: str) -> tuple[PublicKey, ...]:
        try:
            async with asyncio.timeout(self._timeout):
                discovery = await self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
                return read_keys(await self._get(read_discovery(discovery, issuer)))
        except TimeoutError:
            raise Unavailable(f"it does not respond within {self._timeout:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise Unavailable(str(error)[:300]) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # their messages may quote the response
            raise Unavailable(f"its response cannot be read ({type(error).__name__})") from None

    async def _get(self, url: str) -> bytes:
        """Fetches one document. Raises Unavailable, and the errors of aiohttp."""
        for _ in range(_MOST_REDIRECTS + 1):
            async with self._session_once().get(url, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    url = _redirected(url, answer.headers.get("Location", ""))
                    continue
                if answer.status != 200:  # noqa: PLR2004 - HTTP's
                    raise Unavailable(f"{url} responds with HTTP {answer.status}")
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise Unavailable(f"{url} responds with compressed data, which was not requested")
                return await _read(answer)
        raise Unavailable(f"{url} is a redirect too many: at most {_MOST_REDIRECTS} are followed")

    def _session_once(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=_Resolver(), force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "bkpool"},
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


class _Resolver(ThreadedResolver):
    """Takes `localhost` for 127.0.0.1, so that a listener on ::1 or /etc/hosts decides nothing about keys."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return await super().resolve("127.0.0.1" if host == "localhost" else host, port, family)


def _redirected(url: str, location: str) -> str:
    target, asked = urljoin(url, location), urlsplit(url)
    if not location or not target.startswith(f"{asked.scheme}://{asked.netloc}/"):
        raise Unavailable(f"{url} redirects to another host, port or scheme, which is not allowed")
    return target


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise Unavailable(f"{answer.url} responds with more than {_MOST_BYTES >> 10} KiB")
    return bytes(body)


def _unavailable(issuer: str, cached: _CachedKeys) -> Unavailable:
    return Unavailable(
        f"the keys of the issuer {issuer} cannot be fetched: {cached.failure}",
        hint="Try again. If it continues, the operator of this appliance should check `issuer` and the network.",
        retry_after=round(RETRY_SECONDS),
    )
