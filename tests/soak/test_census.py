"""What a soak counts: it empties caches with a bound before, and leaves out the threads of groups with a bound."""

from __future__ import annotations

import asyncio
import sys
import threading
from functools import lru_cache
from types import ModuleType

import pytest
from soak.census import census, count_threads, empty_caches

from bkpool.core.pool import Pool
from bkpool.home.threads import Threads
from bkpool.store.recent import RecentlyWritten


@pytest.mark.parametrize(
    ("bound", "module", "kept"),
    [(8, "bkpool.made_for_this", 0), (None, "bkpool.made_for_this", 1), (8, "made_for_this", 1)],
    ids=["ours", "ours without a bound", "not ours"],
)
def test_only_caches_of_bkpool_with_a_bound_are_emptied_before_the_count(monkeypatch, bound, module, kept):
    made = ModuleType(module)
    made.cache = lru_cache(bound)(str)
    made.cache(1)
    monkeypatch.setitem(sys.modules, module, made)
    empty_caches()
    assert made.cache.cache_info().currsize == kept


def test_the_documents_that_were_written_last_are_not_counted():
    def pools() -> int:
        return census()["objects"].get("core.pool.PoolSpec", 0)

    before, recent = pools(), RecentlyWritten()
    recent.add(b"a text", {"metadata": {}}, Pool.model_validate({"metadata": {"name": "kept"}, "spec": {}}))
    assert pools() == before
    assert recent.doc(b"a text") is None


def test_a_permit_that_is_not_given_back_is_counted():
    semaphore = asyncio.Semaphore(3)
    before = census()["permits that are not free"]
    asyncio.run(semaphore.acquire())
    assert census()["permits that are not free"] == before + 1


def test_threads_of_groups_with_a_bound_are_not_counted_and_all_others_are():
    group = Threads("worker files", 2)
    both = threading.Barrier(3)
    names = [group.submit(lambda: (both.wait(), threading.current_thread().name)[1]) for _ in range(2)]  # two threads
    both.wait()
    found = ["MainThread", "gateway-0", "asyncio_0", "asyncio_1", *(name.result() for name in names)]
    group.close()
    assert count_threads(found) == 2
    assert count_threads([*found, "Thread-7 (run)"]) == 3
    assert count_threads([*found, names[0].result()]) == 3, "the group was made again, and not ended"
