from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.stub_control import StubControl, serve


@pytest.fixture
def control() -> StubControl:
    return StubControl()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp())  # tmp_path may be too long for a socket
    yield directory / "s"
    shutil.rmtree(directory)


@pytest.fixture
async def endpoint(control: StubControl, socket_path: Path) -> AsyncIterator[str]:
    async with serve(control, path=str(socket_path)):
        yield f"unix://{socket_path}"
