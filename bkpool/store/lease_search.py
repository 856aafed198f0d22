"""Searches the store itself for a lease that a copy in memory does not have: another replica may have just made it.

However many unknown tokens come, the workers are listed at most once a second. It never says whether the lease was
found: the caller looks into its copy again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.store import Store

_LIST_INTERVAL = 1.0
"""Seconds between two lists of all workers, so that many old or forged tokens cannot load the API server."""
_REMEMBERED_TOKENS = 4096
"""Tokens that were searched for, and are not searched for again."""


class LeaseSearch:
    """The searches of one process for tokens that it does not know.

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
        self._list_lock = asyncio.Lock()
        self._lists_started = 0
        self._last_complete_list = 0  # the number of the last list that succeeded
        self._list_started_at = -_LIST_INTERVAL
        self._searched_tokens: dict[str, None] = {}  # the oldest first

    async def find(self, token_sha256: str) -> None:
        """Lists the workers, unless this token was searched for before.

        Searches that wait share the next list. Each token is searched for only once: a client gets its token after
        the lease is in the store, so a lease that is not there now will not be there later.

        Args:
            token_sha256: The digest of a well-formed token.

        Raises:
            Unavailable: The store does not answer.
        """
        if token_sha256 in self._searched_tokens:
            return
        lists_started = self._lists_started
        async with self._list_lock:
            if self._last_complete_list <= lists_started:  # else a list that started after this call has succeeded
                await self._list_workers()
        self._searched_tokens[token_sha256] = None
        if len(self._searched_tokens) > _REMEMBERED_TOKENS:
            del self._searched_tokens[next(iter(self._searched_tokens))]

    async def _list_workers(self) -> None:
        time = asyncio.get_running_loop().time
        # Also with 0 seconds: the searches that start in this iteration of the loop share this list.
        await self._pause(max(0.0, self._list_started_at + _LIST_INTERVAL - time()))
        self._lists_started += 1
        self._list_started_at = time()
        listing = await self._store.list(Worker)
        found: list[Worker | Unreadable] = [*listing.items, *listing.unreadable]
        for worker in found:
            self._on_worker(worker)
        await asyncio.sleep(0)  # in this iteration whoever follows the copy takes the news over
        self._last_complete_list = self._lists_started
