"""Searches the store itself for a lease that a copy in memory does not have: another replica may have just made it.

However many unknown tokens come, the workers are listed at most once a second. No search ends or delays another one.
It never says whether the lease was found: the caller looks into its copy again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.store import Store
from bkpool.store.readable_scopes import list_readable

_LIST_INTERVAL = 1.0
"""Seconds between two lists of all workers, so that many old or forged tokens cannot load the API server."""
_AT_ONCE = 100
"""Workers that are handed on without a pause: some milliseconds."""
_REMEMBERED_TOKENS = 4096
"""Tokens that were searched for, and are not searched for again."""


class LeaseSearch:
    """The searches of one role of a process for tokens that it does not know.

    Args:
        store: The store with the workers.
        on_worker: Called with every worker that is found (`Mirror.apply`).
        pause: Waits this many seconds before the workers are listed again.
    """

    def __init__(
        self,
        store: Store,
        on_worker: Callable[[Worker | Unreadable], None],
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._on_worker = on_worker
        self._pause = pause
        self._next: _Round | None = None
        """The list that has not begun. Who searches now waits for it."""
        self._last: _Round | None = None
        self._list_started_at = -_LIST_INTERVAL
        self._searched_tokens: dict[str, None] = {}  # the oldest first

    async def find(self, token_sha256: str) -> None:
        """Lists the workers, unless this token was searched for before.

        Searches that wait share the next list, and its error. Each token is searched for only once: a client gets its
        token after the lease is in the store, so a lease that is not there now will not be there later. A namespace
        that may not be read is left out: once it may be, the copy in memory has all of its leases.

        Args:
            token_sha256: The digest of a well-formed token.

        Raises:
            Unavailable: The store does not answer.
        """
        if token_sha256 in self._searched_tokens:
            return
        await self._next_list()
        self._searched_tokens[token_sha256] = None
        if len(self._searched_tokens) > _REMEMBERED_TOKENS:
            del self._searched_tokens[next(iter(self._searched_tokens))]

    async def _next_list(self) -> None:
        """Waits for a list that begins after this call. A search that is given up ends it only if no other waits."""
        if self._next is None:
            self._next = self._last = _Round(asyncio.create_task(self._list_workers(self._last)))
        this = self._next
        this.searches += 1
        try:
            await asyncio.shield(this.list)
        finally:
            this.searches -= 1
            if not this.searches:
                this.list.cancel()
                self._next = None if self._next is this else self._next

    async def _list_workers(self, before: _Round | None) -> None:
        time = asyncio.get_running_loop().time
        if before is not None:
            await asyncio.wait([before.list])
        # Also with 0 seconds: the searches that start in this iteration of the loop share this list.
        await self._pause(max(0.0, self._list_started_at + _LIST_INTERVAL - time()))
        self._next = None
        self._list_started_at = time()
        listed = await list_readable(self._store, Worker)
        found: list[Worker | Unreadable] = [*listed.items, *listed.unreadable]
        for start in range(0, len(found), _AT_ONCE):
            for worker in found[start : start + _AT_ONCE]:
                self._on_worker(worker)
            await asyncio.sleep(0)


@dataclass(slots=True)
class _Round:
    """One list, and how many searches wait for it."""

    list: asyncio.Task[None]
    searches: int = 0
