"""The keys of issuers: fetched when they are wanted, kept for a while, and never asked for often.

Only configured issuers are asked, so nobody can make the appliance call an address of his choice. Everything they
answer is bounded in time and size, and `jwks` judges it; no token ever comes here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import aiohttp
import structlog
from jwt import PyJWK

from bkpool.core.errors import Unauthenticated, Unavailable
from bkpool.identity.jwks import PublicKey, choose, read_discovery, read_keys
from bkpool.identity.jwt import shown

log = structlog.get_logger(__name__)

FRESH = 600.0
"""Seconds for which keys are taken without asking again."""
STALE = 3600.0
"""Seconds for which they are, while the issuer cannot be asked."""
PAUSE = 10.0
"""Seconds between two tries at an issuer that could not be asked, and between two for keys that were not there."""

_TIMEOUT = 5.0  # seconds for both documents together, redirects included
_MOST_BYTES = 512 << 10  # of one document: the largest known, with certificates, have some 30 KiB
_MOST_REDIRECTS = 2
_MOST_ISSUERS = 1000
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(slots=True)
class _CachedKeys:
    """What is known of one issuer. Times are the clock's."""

    keys: tuple[PublicKey, ...] = ()
    had: float = -math.inf
    """When the keys were answered."""
    failure: str = ""
    """Why the last try brought none."""
    failed: float = -math.inf
    searched: float = -math.inf
    """When it was last asked because a key was not there."""
    flight: asyncio.Task[None] | None = None


class IssuerKeys:
    """The keys of all issuers. Used in one event loop.

    Args:
        clock: Monotonic seconds.
        timeout: Seconds that an issuer has to answer.
        fresh: Seconds for which keys are used before the issuer is asked again.
        stale: Seconds for which they are used while the issuer does not answer.
    """

    def __init__(
        self, *, clock: Callable[[], float], timeout: float = _TIMEOUT, fresh: float = FRESH, stale: float = STALE
    ) -> None:
        self._clock = clock
        self._timeout = timeout
        self._fresh = fresh
        self._stale = stale
        self._kept: dict[str, _CachedKeys] = {}
        self._flights: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def key(self, issuer: str, kid: str | None, alg: str) -> PyJWK:
        """The key of a configured issuer that a token names.

        Raises:
            Unauthenticated: The issuer has no such key.
            Unavailable: It cannot be asked, or what it answers is of no use.
        """
        kept = await self._current(issuer)
        if (found := choose(kept.keys, kid, alg)) is not None:
            return found
        if self._clock() - kept.searched >= PAUSE:  # a key may be new; but whoever makes up names must not hammer it
            kept.searched = self._clock()
            await self._ask(issuer, kept)
        elif kept.flight is not None:
            await asyncio.shield(kept.flight)
        if (found := choose(kept.keys, kid, alg)) is not None:
            return found
        if kept.failure:
            raise _unavailable(issuer, kept)
        which = "exactly one key" if kid is None else f"a key {shown(kid)}"
        raise Unauthenticated(f"{issuer} does not have {which} for {alg}")

    async def probe(self, issuer: str) -> int:
        """How many usable keys an issuer has.

        Raises:
            Unavailable: The last try to ask it failed, even if keys are still known from before.
        """
        kept = await self._current(issuer)
        if kept.failure:
            await self._ask(issuer, kept)
        if kept.failure:
            raise _unavailable(issuer, kept)
        return len(kept.keys)

    async def close(self) -> None:
        """Ends what is under way."""
        for flight in self._flights:
            flight.cancel()
        await asyncio.gather(*self._flights, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _current(self, issuer: str) -> _CachedKeys:
        """What may be used of an issuer's keys now. Raises Unavailable."""
        kept = self._kept.pop(issuer, None) or _CachedKeys()
        self._kept[issuer] = kept  # the last one used is the last one forgotten
        while len(self._kept) > _MOST_ISSUERS:
            del self._kept[next(iter(self._kept))]
        if self._clock() - kept.had >= self._fresh:
            await self._ask(issuer, kept)
        if self._clock() - kept.had >= self._stale:
            raise _unavailable(issuer, kept)
        return kept

    async def _ask(self, issuer: str, kept: _CachedKeys) -> None:
        """Asks the issuer, or waits for who is asking already; not if it failed a moment ago. Raises nothing."""
        if kept.flight is None:
            if self._clock() - kept.failed < PAUSE:
                return
            kept.flight = asyncio.create_task(self._fly(issuer, kept), name=f"keys of {issuer}")
            self._flights.add(kept.flight)
            kept.flight.add_done_callback(self._flights.discard)
        await asyncio.shield(kept.flight)  # whoever gives up waiting must not take it from the others

    async def _fly(self, issuer: str, kept: _CachedKeys) -> None:
        try:
            kept.keys = await self._fetch(issuer)
            kept.had, kept.failure, kept.failed = self._clock(), "", -math.inf
        except Unavailable as error:
            kept.failure, kept.failed = error.message, self._clock()
            log.warning("issuer.unavailable", issuer=issuer, reason=error.message)
        finally:
            kept.flight = None

    async def _fetch(self, issuer: str) -> tuple[PublicKey, ...]:
        try:
            async with asyncio.timeout(self._timeout):
                discovery = await self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
                return read_keys(await self._get(read_discovery(discovery, issuer)))
        except TimeoutError:
            raise Unavailable(f"it does not answer within {self._timeout:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise Unavailable(str(error)[:300]) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # their words may repeat what was answered
            raise Unavailable(f"it is not to be understood ({type(error).__name__})") from None

    async def _get(self, url: str) -> bytes:
        """One document. Raises Unavailable and what aiohttp raises."""
        for _ in range(_MOST_REDIRECTS + 1):
            async with self._opened().get(url, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    url = _redirected(url, answer.headers.get("Location", ""))
                    continue
                if answer.status != 200:  # noqa: PLR2004 - HTTP's
                    raise Unavailable(f"{url} answers with HTTP {answer.status}")
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise Unavailable(f"{url} answers compressed, which was not asked for")
                return await _read(answer)
        raise Unavailable(f"{url}, at last, redirects once more: {_MOST_REDIRECTS} times are followed")

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "bkpool"},
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def _redirected(url: str, location: str) -> str:
    target, asked = urljoin(url, location), urlsplit(url)
    if not location or not target.startswith(f"{asked.scheme}://{asked.netloc}/"):
        raise Unavailable(f"{url} redirects to another host, port or scheme: not followed")
    return target


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise Unavailable(f"{answer.url} answers with more than {_MOST_BYTES >> 10} KiB")
    return bytes(body)


def _unavailable(issuer: str, kept: _CachedKeys) -> Unavailable:
    return Unavailable(
        f"The issuer {issuer} cannot be asked for its keys: {kept.failure}",
        hint="Try again; if it stays so, whoever runs this appliance looks at the issuer and the way to it.",
        retry_after=round(PAUSE),
    )
