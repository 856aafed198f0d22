"""The API on the Unix socket: for the appliance's own user, and for nobody else, even if file modes let them in."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from prometheus_client import CollectorRegistry

from bkpool.api import open_runner
from bkpool.appliance.http import FEW_CLIENTS, metrics_app, serve
from bkpool.appliance.local_site import LocalSite
from bkpool.appliance.run_options import Address
from bkpool.cli.api_connection import dial_local
from bkpool.home import local_socket, runtime_directory
from bkpool.home.local_socket import SocketPlaces
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
        await serve(
            stack, metrics_app(CollectorRegistry()), Address("127.0.0.1", 0), "here", local=SocketPlaces(path, path)
        )
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
    path, _ = places = local_socket.prepare(home, os.environ)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert local_socket.prepare(home, os.environ) == places
    assert not path.exists()
    local_socket.remove(home, os.environ)
    assert not default_directory(home, os.environ).exists()


async def test_a_socket_that_somebody_removed_is_made_again_with_its_directory(place):
    """As at the end of a session, while the appliance runs on."""
    directory = place / "sockets"
    runtime_directory.claim(directory)
    path = directory / "api.sock"
    async with AsyncExitStack() as stack:
        runner = await open_runner(stack, metrics_app(CollectorRegistry()), shutdown_timeout=2, limits=FEW_CLIENTS)
        site = LocalSite(runner, SocketPlaces(path, path), interval=0.01)
        await site.start()
        keeping = asyncio.create_task(site.keep())
        for remove in (path.unlink, lambda: shutil.rmtree(directory)):
            remove()
            async with asyncio.timeout(60):
                while not path.exists():  # noqa: ASYNC110 - no event announces a file
                    await asyncio.sleep(0.01)
            assert b"200 OK" in await answer(path)
            assert runtime_directory.is_private(directory)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_commands_find_the_socket_when_its_directory_cannot_be_made_again(place):
    """As at the end of a session: only root can make /run/user/UID again."""
    home, session = place / "home", place / "session"
    home.mkdir(mode=0o700)
    path, spare = session / "sockets" / "api.sock", local_socket.spare(home)
    runtime_directory.claim(path.parent)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, spare.parent, ignore_errors=True)
        runner = await open_runner(stack, metrics_app(CollectorRegistry()), shutdown_timeout=2, limits=FEW_CLIENTS)
        site = LocalSite(runner, SocketPlaces(path, spare), interval=0.01)
        await site.start()
        keeping = asyncio.create_task(site.keep())
        dial_local(path, home).close()
        session.rename(place / "gone")
        session.touch()  # so that not even root can make a directory there
        async with asyncio.timeout(60):
            while not is_there(spare):  # noqa: ASYNC110 - no event announces a file
                await asyncio.sleep(0.01)
        assert runtime_directory.is_private(spare.parent)
        with await asyncio.to_thread(eventually_dialled, path, home) as connected:
            assert connected.getpeername() == str(spare)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


def is_there(path: Path) -> bool:
    return path.exists()


def eventually_dialled(path: Path, home: Path) -> socket.socket:
    """A connection as a command makes it. The file of a socket is there a moment before anybody listens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return dial_local(path, home)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
