"""The fixed bearer tokens of a pool (`spec.auth.methods[type=token]`): for callers that have no issuer.

Tokens are read from a private file or a Secret, and kept as digests only. What they say is read in `entries`.
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
from bkpool.core.wildcards import any_matches
from bkpool.home.files import read_private, unreadable
from bkpool.identity import Identity, Scope, Verdict
from bkpool.identity.static_token_parser import StaticToken, StaticTokens, parse_document, parse_static_tokens
from bkpool.kube import Doc, KubeApi, paths

log = structlog.get_logger(__name__)

LARGEST = 1 << 20
"""Bytes of a file: as much as a Secret may have (Kubernetes documentation, "Secrets")."""
FRESH = 10.0
"""Seconds for which a Secret is not read again: how long a withdrawn token may still open the pool."""
PATIENCE = 5.0
"""Seconds for one reading of a Secret: every caller waits for it, also those with other credentials."""

_HINT = "Write a mapping: each user's name with his token (docs/access.md)."

# --- from where -----------------------------------------------------------------------------------------------------


class TokenReader(Protocol):
    """Where tokens come from."""

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        """The tokens as they are now, or were a moment ago; none where the source is another backend's.

        Args:
            namespace: The pool's.
            source: As the pool says it.

        Raises:
            BkpoolError: They cannot be read just now; the message holds none of them.
        """


class FileTokenReader:
    """Private files of this machine (YAML or JSON), read again when they have changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[tuple[int, ...], StaticTokens]] = {}

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        """See TokenReader. A file that is missing, or that others can read, is an error: nobody is let in by it."""
        del namespace  # a machine has none
        return StaticTokens() if source.file is None else await asyncio.to_thread(self._file, source.file)

    def _file(self, name: str) -> StaticTokens:
        path = Path(name)
        try:
            found = path.stat()
        except OSError as error:
            raise unreadable(path, error.strerror or type(error).__name__, hint=_HINT) from None
        mark = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        before = self._read.get(name)
        if before is not None and before[0] == mark:
            return before[1]
        self._read.pop(name, None)
        if found.st_size > LARGEST:
            raise unreadable(path, f"is larger than {LARGEST} bytes", hint=_HINT)
        data = parse_document(read_private(path, hint=_HINT).decode("utf-8", "replace"))
        if not isinstance(data, dict):
            raise unreadable(path, "is not a mapping in YAML or JSON", hint=_HINT)
        self._read[name] = (mark, tokens := parse_static_tokens(data))
        return tokens


@dataclass(slots=True)
class _CachedSecret:
    """A Secret as of its last reading."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    until: float = float("-inf")
    version: str | None = None
    tokens: StaticTokens = field(default_factory=StaticTokens)
    failure: BkpoolError | None = None


class SecretTokenReader:
    """Secrets in the namespaces of the pools. One that is missing has no token.

    Args:
        api: The cluster.
        clock: Seconds, as time.monotonic has them.
        fresh: Seconds for which a Secret is not read again.
    """

    def __init__(self, api: KubeApi, clock: Callable[[], float] = time.monotonic, fresh: float = FRESH) -> None:
        self._fresh = fresh
        self._api = api
        self._clock = clock
        self._kept: dict[Key, _CachedSecret] = {}

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        """See TokenReader. One reading at a time and Secret; a failed one counts as long as a good one."""
        if source.secret_ref is None:
            return StaticTokens()
        secret = Key(namespace, source.secret_ref)
        kept = self._kept.setdefault(secret, _CachedSecret())
        async with kept.lock:
            if self._clock() >= kept.until:
                await self._renew(secret, kept)
            if kept.failure is not None:
                raise kept.failure
            return kept.tokens

    async def _renew(self, secret: Key, kept: _CachedSecret) -> None:
        kept.failure = None
        try:
            async with asyncio.timeout(PATIENCE):
                found = await self._api.get(paths.core("secrets", *secret))
        except NotFound:
            kept.version, kept.tokens = None, StaticTokens()
        except TimeoutError:
            kept.failure = Unavailable(f"Kubernetes: Secret {secret} is not told within {PATIENCE:g} s")
        except BkpoolError as error:
            kept.failure = error
        else:
            version = found["metadata"]["resourceVersion"]
            if version != kept.version:
                # In a thread: long YAML of one namespace is no reason for all others to wait.
                kept.version, kept.tokens = version, await asyncio.to_thread(parse_static_tokens, _data(found))
        kept.until = self._clock() + self._fresh


def _data(secret: Doc) -> dict[str, object]:
    return {key: _decoded(value) for key, value in sorted((secret.get("data") or {}).items())}


def _decoded(value: str) -> str | None:
    try:
        return base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        return None


# --- who is calling -------------------------------------------------------------------------------------------------


class StaticTokenAuthenticator:
    """Knows the callers of pools that have tokens of their own; each counts at its pool only.

    Tokens that cannot be read let nobody in, and keep nobody out whom another authenticator knows: that is said in a
    verdict rather than raised.

    Args:
        reader: Where this backend has them.
        pools: All pools as of now.
    """

    def __init__(self, reader: TokenReader, pools: Callable[[], Iterable[Pool]]) -> None:
        self._reader = reader
        self._pools = pools
        self._said: dict[tuple[Key, int], str] = {}

    async def authenticate(self, bearer: str) -> tuple[Verdict, ...]:
        """See Authenticator. It never raises Unavailable."""
        asked = [
            self._judged(bearer, pool.key, number, source)
            for pool in self._pools()
            for number, source in enumerate(pool.spec.auth.tokens)
        ]
        return tuple(chain.from_iterable(await asyncio.gather(*asked)))

    async def _judged(self, bearer: str, pool: Key, number: int, source: TokenFrom) -> list[Verdict]:
        name = f"BuildKitPool {pool} (token)"
        try:
            tokens = await self._reader.read(pool.namespace, source)
        except BkpoolError as error:
            self._say(pool, number, error.message)
            # Whoever reads this may be nobody: it does not name the pool.
            return [Verdict(name, refusal="the tokens of a pool cannot be read just now")]
        self._say(pool, number, "; ".join(tokens.faults))
        return [_verdict(name, pool, entry) for entry in tokens.of(bearer)]

    def _say(self, pool: Key, number: int, fault: str) -> None:
        """Logs what is wrong once, until it is something else."""
        if fault == self._said.get((pool, number), ""):
            return
        self._said[pool, number] = fault
        if fault:
            log.warning("tokens.faulty", pool=str(pool), reason=fault)
        else:
            log.info("tokens.good_again", pool=str(pool))


def _verdict(source: str, pool: Key, entry: StaticToken) -> Verdict:
    fits = entry.pools is None or any_matches(entry.pools, pool.name) or any_matches(entry.pools, str(pool))
    if not fits:
        return Verdict(source, refusal=f"this token of {entry.user} is not for pool {pool}", genuine=True)
    scope = Scope(pool.namespace, pool.name)
    return Verdict(source, Identity(entry.user, authority=f"tokens of {pool}", source=source, scope=scope))
