"""The backend CA of each pool: it signs the certificates between a pool's gateways and its workers, and no other's.

buildkitd trusts every client certificate of its CA. So each pool has a CA of its own, whose key follows from the
appliance's backend key and the pool's name. Nothing more is stored, and nothing more can be lost. It opens no
connection.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from bkpool.core.names import Key
from bkpool.pki.authority import Authority, renew_at
from bkpool.pki.worker_tls import worker_context

DIALLER_LIFE = timedelta(days=3)
"""How long a client certificate for workers is valid. It is renewed more than a day before that ends, so a controller
may be gone for a day, which is the longest life of a lease by default."""


class PoolAuthorities:
    """The backend CAs of all pools.

    Args:
        masters: The appliance's backend CA, from which those of the pools are made; after it those that a rotation
            has replaced.
    """

    def __init__(self, *masters: Authority) -> None:
        self._masters = masters
        self._made: dict[Key, tuple[Authority, ...]] = {}

    def current(self, pool: Key) -> Authority:
        """The CA that signs for this pool now."""
        return self._of(pool)[0]

    def former(self, pool: Key) -> tuple[Authority, ...]:
        """The CAs of workers that were made before a rotation, or before each pool had a CA of its own."""
        return (*self._of(pool)[1:], *self._masters)

    def of_worker(self, pool: Key, mark: str) -> tuple[Authority, ...]:
        """The CAs of which one has signed for a worker with this mark.

        Args:
            pool: The worker's pool.
            mark: `Authority.mark` of its CA; empty if the worker was made before each pool had a CA of its own.
        """
        return tuple(one for one in self._of(pool) if one.mark == mark) if mark else self._masters

    def _of(self, pool: Key) -> tuple[Authority, ...]:
        if pool not in self._made:
            self._made[pool] = tuple(master.derived(f"bkpool backend CA of {pool}") for master in self._masters)
        return self._made[pool]


class WorkerContexts:
    """The TLS settings by which one process connects to the workers of each pool. It may be used in any thread.

    Args:
        authorities: The CAs.
        name: The name of this process in its certificates, in ASCII.
        now: The clock.
    """

    def __init__(self, authorities: PoolAuthorities, name: str, now: Callable[[], datetime]) -> None:
        self._authorities = authorities
        self._name = name
        self._now = now
        self._made: dict[str, tuple[ssl.SSLContext, datetime]] = {}

    def of(self, pool: Key) -> list[ssl.SSLContext]:
        """Those for all workers of a pool, the most likely one first."""
        return self._for((self._authorities.current(pool), *self._authorities.former(pool)))

    def of_worker(self, pool: Key, mark: str) -> list[ssl.SSLContext]:
        """Those of which one fits a worker; arguments as for `PoolAuthorities.of_worker`."""
        return self._for(self._authorities.of_worker(pool, mark))

    def _for(self, authorities: Sequence[Authority]) -> list[ssl.SSLContext]:
        return [self._with(authority) for authority in authorities]

    def _with(self, authority: Authority) -> ssl.SSLContext:
        context, due = self._made.get(authority.mark, (None, None))
        now = self._now()
        if context is None or due is None or now >= due:
            leaf = authority.issue_dialler(self._name, now, now + DIALLER_LIFE)
            context = worker_context(leaf.cert_pem, leaf.key_pem or b"", authority.cert_pem)
            self._made[authority.mark] = context, renew_at(leaf.cert_pem)
        return context
