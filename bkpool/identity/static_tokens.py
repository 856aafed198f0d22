"""Authenticates callers with a static bearer token of a pool (`spec.auth.methods`, type `token`).

Tokens are read from a private file or a Secret, and only their digests are cached.
static_token_parser.py parses them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Protocol

import structlog

from bkpool.core.auth import TokenFrom
from bkpool.core.errors import BkpoolError, NotFound, Unavailable
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import CallerMethod, RememberedCaller
from bkpool.core.wildcards import any_matches
from bkpool.core.yaml_text import UnreadableYaml
from bkpool.home.files import read_private, unreadable
from bkpool.home.threads import Threads
from bkpool.identity import Identity, Scope, Verdict
from bkpool.identity.static_token_parser import (
    MAX_BYTES,
    StaticToken,
    StaticTokens,
    parse_document,
    parse_static_tokens,
)
from bkpool.kube import Doc, KubeApi, paths

log = structlog.get_logger(__name__)

FRESH_SECONDS = 10.0
"""For this long, a Secret is not read again. So a removed token may still be accepted for this long."""
READ_TIMEOUT = 5.0
"""Seconds to read a Secret. Callers who ask for the pool with a static token wait for it."""
OTHERS_TIMEOUT = 1.0
"""Seconds that callers wait for the Secrets of pools that they did not ask for."""
_FILE_THREADS = 2
_FILE_TIMEOUT = 10.0
"""Seconds in which a file must be read. It takes a millisecond where its disk does not hang."""
_MOST_SECRETS = 1000  # kept in memory at least until they are no longer fresh

_HINT = "Write a mapping from each user's name to their token (docs/access.md)."

# --- sources --------------------------------------------------------------------------------------------------------


class TokenReader(Protocol):
    """Reads the tokens of a source."""

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        """The tokens as they are now, or were a moment ago. None if the source is for another backend.

        Args:
            namespace: The pool's namespace.
            source: The file or the Secret that the pool names.

        Raises:
            BkpoolError: They cannot be read now. The message contains no token.
        """


class FileTokenReader:
    """Reads private files of this machine (YAML or JSON), again only when they have changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[tuple[int, ...], StaticTokens]] = {}
        self._threads = Threads("token files", _FILE_THREADS)

    def close(self) -> None:
        """Ends its threads. Later reads get new ones."""
        self._threads.close()

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        """See TokenReader. A missing file, or one that other users can read, is an error: no token is accepted."""
        del namespace  # there are none on a machine
        if source.file is None:
            return StaticTokens()
        timer = asyncio.timeout(_FILE_TIMEOUT)
        try:
            async with timer:
                return await asyncio.wrap_future(self._threads.submit(self._read_file, source.file))
        except TimeoutError:
            if not timer.expired():
                raise
            raise Unavailable(
                f"{source.file} could not be read within {_FILE_TIMEOUT:g} s", hint="Its disk hangs: look at dmesg."
            ) from None

    def _read_file(self, name: str) -> StaticTokens:
        path = Path(name)
        try:
            found = path.stat()
        except OSError as error:
            raise unreadable(path, error.strerror or type(error).__name__, hint=_HINT) from None
        fingerprint = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        before = self._read.get(name)
        if before is not None and before[0] == fingerprint:
            return before[1]
        self._read.pop(name, None)
        if found.st_size > MAX_BYTES:
            raise unreadable(path, f"is larger than {MAX_BYTES} bytes", hint=_HINT)
        try:
            data = parse_document(read_private(path, hint=_HINT).decode("utf-8", "replace"))
        except UnreadableYaml as error:
            line = f"line {error.line}: " if error.line else ""
            raise unreadable(path, f"{line}{error.problem}", hint=_HINT) from None
        if not isinstance(data, dict):
            raise unreadable(path, "is not a mapping in YAML or JSON", hint=_HINT)
        self._read[name] = (fingerprint, tokens := parse_static_tokens(data))
        return tokens


@dataclass(slots=True)
class _CachedSecret:
    """A Secret as it was read last."""

    until: float = float("-inf")
    version: str | None = None
    tokens: StaticTokens = field(default_factory=StaticTokens)
    failure: BkpoolError | None = None
    reading: asyncio.Task[None] | None = None
    """What reads it now."""


class SecretTokenReader:
    """Reads Secrets in the namespaces of the pools. A missing Secret has no tokens.

    Args:
        api: The cluster.
        clock: Monotonic seconds.
        fresh: For this many seconds, a Secret is not read again.
        timeout: Seconds to read one.
    """

    def __init__(
        self,
        api: KubeApi,
        clock: Callable[[], float] = time.monotonic,
        fresh: float = FRESH_SECONDS,
        timeout: float = READ_TIMEOUT,
    ) -> None:
        self._fresh = fresh
        self._timeout = timeout
        self._api = api
        self._clock = clock
        self._cache: dict[Key, _CachedSecret] = {}

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        """See TokenReader. Each Secret is read by one task at a time. A failure is cached as long as a success.

        A caller who no longer waits does not end that task, so the next one finds its result.
        """
        if source.secret_ref is None:
            return StaticTokens()
        secret = Key(namespace, source.secret_ref)
        cached = self._cache.get(secret) or self._new(secret)
        if self._clock() >= cached.until:
            if cached.reading is None:
                cached.reading = asyncio.create_task(self._refresh(secret, cached), name=f"Secret {secret}")
            await asyncio.shield(cached.reading)
        if cached.failure is not None:
            raise cached.failure
        return cached.tokens

    def _new(self, secret: Key) -> _CachedSecret:
        if len(self._cache) >= _MOST_SECRETS:
            now = self._clock()
            self._cache = {key: one for key, one in self._cache.items() if one.reading or one.until > now}
        cached = self._cache[secret] = _CachedSecret()
        return cached

    async def _refresh(self, secret: Key, cached: _CachedSecret) -> None:
        try:
            cached.failure = None
            await self._fetch(secret, cached)
            cached.until = self._clock() + self._fresh
        finally:
            cached.reading = None

    async def _fetch(self, secret: Key, cached: _CachedSecret) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                found = await self._api.get(paths.core("secrets", *secret))
        except NotFound:
            cached.version, cached.tokens = None, StaticTokens()
        except TimeoutError:
            cached.failure = Unavailable(f"Kubernetes: Secret {secret} could not be read within {self._timeout:g} s")
        except BkpoolError as error:
            cached.failure = error
        else:
            version = found["metadata"]["resourceVersion"]
            if version != cached.version:  # in a thread: YAML may take a while, and the loop serves all callers
                cached.version, cached.tokens = version, await asyncio.to_thread(parse_static_tokens, _data(found))


def _data(secret: Doc) -> dict[str, object]:
    return {key: _decoded(value) for key, value in sorted((secret.get("data") or {}).items())}


def _decoded(value: str) -> str | None:
    try:
        return base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        return None


# --- authenticator --------------------------------------------------------------------------------------------------


_NOT_READ = Verdict("static tokens", refusal="the tokens of a pool cannot be read now")
"""It names no pool, because the caller may have no access to it."""
_MOST_FAULTS = 20  # of one source in one log line


class StaticTokenAuthenticator:
    """Identifies the callers that have a static token of a pool. The identity is valid for that pool only.

    If tokens cannot be read, the result is a refusal instead of an error. So a caller that another authenticator
    accepts is not affected.

    Args:
        reader: Reads the tokens of this backend.
        pools: Returns all current pools.
        others_timeout: Seconds that a caller waits for the tokens of pools that they did not ask for.
    """

    def __init__(
        self, reader: TokenReader, pools: Callable[[], Iterable[Pool]], others_timeout: float = OTHERS_TIMEOUT
    ) -> None:
        self._others_timeout = others_timeout
        self._reader = reader
        self._pools = pools
        self._reported: dict[tuple[Key, int], str] = {}

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:
        """See Authenticator. It never raises Unavailable.

        The tokens of the pool that the caller asks for are read first, and if they accept the caller, no others are.
        Else the tokens of other pools decide what the caller is told; those that take too long are left out.
        """
        pools = list(self._pools())
        own = [verdicts for one in pools if one.key == pool for verdicts in await self._of_pool(bearer, one)]
        if any(verdict.identity is not None for verdict in own):
            return tuple(own)
        return (*own, *await self._of_others(bearer, [one for one in pools if one.key != pool]))

    async def recall(self, caller: RememberedCaller, pool: Pool) -> tuple[Verdict, ...]:
        """See Authenticator. The caller must still have a token of the pool, not necessarily the same one.

        Raises:
            Unavailable: The tokens cannot be read now, and those that can do not have the caller.
        """
        name = _source_name(pool.key)
        if caller.method is not CallerMethod.TOKEN or caller.issuer != _authority(pool.key):
            return ()
        verdicts: list[Verdict] = []
        unread = False
        for number, source in enumerate(pool.spec.auth.tokens):
            tokens = await self._read(pool.key, number, source)
            unread = unread or tokens is None
            entries = tokens.entries if tokens else ()
            verdicts += [_verdict(name, pool.key, entry) for entry in entries if entry.user == caller.user]
        if any(verdict.identity is not None for verdict in verdicts):
            return tuple(verdicts)
        if unread:
            raise Unavailable(
                "the tokens of the pool cannot be read now, so it is not known whether the caller still has one",
                hint="Try again. The appliance's log says why they cannot be read.",
                retry_after=5,
            )
        return tuple(verdicts) or (Verdict(name, refusal="the caller has no token of the pool any more"),)

    async def _of_pool(self, bearer: str, pool: Pool) -> list[Verdict]:
        found = [self._verdicts(bearer, pool.key, n, source) for n, source in enumerate(pool.spec.auth.tokens)]
        return list(chain.from_iterable(await asyncio.gather(*found)))

    async def _of_others(self, bearer: str, pools: Iterable[Pool]) -> list[Verdict]:
        reading = [asyncio.ensure_future(self._of_pool(bearer, one)) for one in pools if any(one.spec.auth.tokens)]
        try:
            if reading:
                await asyncio.wait(reading, timeout=self._others_timeout)
            done = [one.result() if one.done() else [_NOT_READ] for one in reading]
        finally:
            for one in reading:
                one.cancel()
        return list(chain.from_iterable(done))

    async def _verdicts(self, bearer: str, pool: Key, number: int, source: TokenFrom) -> list[Verdict]:
        tokens = await self._read(pool, number, source)
        if tokens is None:
            return [_NOT_READ]
        return [_verdict(_source_name(pool), pool, entry) for entry in tokens.of(bearer)]

    async def _read(self, pool: Key, number: int, source: TokenFrom) -> StaticTokens | None:
        """The tokens of one source; None, with a line in the log, if they cannot be read now."""
        try:
            tokens = await self._reader.read(pool.namespace, source)
        except BkpoolError as error:
            self._report(pool, number, error.message)
            return None
        where = source.file or f"Secret {pool.namespace}/{source.secret_ref}"
        self._report(pool, number, "; ".join(f"{where}: {fault}" for fault in tokens.faults[:_MOST_FAULTS]))
        return tokens

    def _report(self, pool: Key, number: int, fault: str) -> None:
        """Logs a fault once, and again only when it changes."""
        if fault == self._reported.get((pool, number), ""):
            return
        self._reported[pool, number] = fault
        if fault:
            log.warning("static_tokens.faulty", pool=str(pool), reason=fault)
        else:
            log.info("static_tokens.repaired", pool=str(pool))


def _verdict(source: str, pool: Key, entry: StaticToken) -> Verdict:
    fits = entry.pools is None or any_matches(entry.pools, pool.name) or any_matches(entry.pools, str(pool))
    if not fits:
        return Verdict(source, refusal=f"this token of {entry.user} is not for pool {pool}", genuine=True)
    scope, method = Scope(pool.namespace, pool.name), CallerMethod.TOKEN
    return Verdict(source, Identity(entry.user, _authority(pool), source=source, scope=scope, method=method))


def _source_name(pool: Key) -> str:
    return f"BuildKitPool {pool} (token)"


def _authority(pool: Key) -> str:
    return f"tokens of {pool}"
