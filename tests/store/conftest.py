from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from bkpool.store import Store
from bkpool.store.sqlite import SqliteStore


@pytest.fixture
async def store(tmp_path) -> AsyncIterator[Store]:
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()
