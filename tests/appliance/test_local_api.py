"""The API on the Unix socket: for the appliance's own user, and for nobody else, even if file modes let them in."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from prometheus_client import CollectorRegistry

from bkpool.appliance.http import metrics_app, serve
from bkpool.appliance.run_options import Address
from bkpool.home import local_socket
from bkpool.home.runtime_directory import default_directory

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    try:
        connection.sendall(b"GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        sys.exit(connection.recv(1) != b"")
    except ConnectionError:
        sys.exit(0)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter; that of an appliance would keep them out."""
    with TemporaryDirectory(prefix="bkpool-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
async def served(place: Path) -> AsyncIterator[Path]:
    path = place / "api.sock"
    async with AsyncExitStack() as stack:
        await serve(stack, metrics_app(CollectorRegistry()), Address("127.0.0.1", 0), "here", local=path)
        yield path


async def answer(path: Path) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(REQUEST)
        return await reader.read()
    finally:
        writer.close()


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_the_own_user_is_served_and_the_mode_keeps_others_out(served: Path) -> None:
    assert (await answer(served)).startswith(b"HTTP/1.1 200 ")
    assert mode_of(served) == 0o600


async def test_a_user_who_is_not_ours_is_hung_up_on(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_socket, "may_connect", lambda _uid: False)
    received = b""
    with suppress(ConnectionError):
        received = await answer(served)
    assert received == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_another_user_gets_nothing_even_if_the_modes_are_open(served: Path) -> None:
    open_to_all(served)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", STRANGER, served, cwd="/")
    assert await process.wait() == 0


def test_what_a_killed_appliance_left_is_removed_and_the_directory_goes_with_the_socket(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = local_socket.prepare(home, os.environ)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert local_socket.prepare(home, os.environ) == path
    assert not path.exists()
    local_socket.remove(home, os.environ)
    assert not default_directory(home, os.environ).exists()
