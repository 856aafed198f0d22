"""A soak empties caches with a bound before it counts. The tests use caches made for them."""

from __future__ import annotations

import asyncio
import sys
from functools import lru_cache
from types import ModuleType

import pytest
from soak.census import census, empty_caches


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


def test_a_permit_that_is_not_given_back_is_counted():
    semaphore = asyncio.Semaphore(3)
    before = census()["permits that are not free"]
    asyncio.run(semaphore.acquire())
    assert census()["permits that are not free"] == before + 1
