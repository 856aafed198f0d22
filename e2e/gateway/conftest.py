"""A gateway as a process, a worker that echoes, and one good client that is there all the time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from bkpool.core import tokens
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from harness import PATIENCE

HERE = Path(__file__).parent
SOON = 1.0
"""Seconds in which a good client must be served beside a thousand bad ones: the number is the issue's own."""


class Served:
    """The gateway's process, and what can be seen of it from outside.

    Args:
        directory: For its log and the worker's socket.
        limits: What of gateway.limits is to be other than it is.
    """

    def __init__(self, directory: Path, limits: dict[str, float]) -> None:
        self.directory = directory
        self.worker = directory / "w"
        self._authority = Authority.create(now := datetime.now(UTC))
        self._ends = now + timedelta(hours=1)
        server = self._authority.issue_server(["localhost"], [IPv4Address("127.0.0.1")], now, self._ends)
        self.log = directory / "log"
        with self.log.open("w") as log:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [sys.executable, HERE / "served.py"], stdin=pipe, stdout=pipe, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
            )  # fmt: skip
        held = {self.token("held"): None}
        leases = {self.token(name): f"unix://{self.worker}" for name in ("good", "bad")}
        settings = {"leases": leases | held, "limits": limits, "ca": self._authority.cert_pem.decode()}
        assert server.key_pem is not None
        settings |= {"cert": server.cert_pem.decode(), "key": server.key_pem.decode()}
        self.port = int(self._ask(json.dumps(settings)))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def descriptors(self) -> int:
        return len(self._numbers())

    @property
    def memory(self) -> int:
        """Bytes of it that are in memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def processor_seconds(self) -> float:
        """Of all its threads so far."""
        times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    @property
    def counters(self) -> dict[str, float]:
        return json.loads(self._ask(""))

    def allow(self, more: int | None) -> None:
        """How many more descriptors it may open; None: as many as at first.

        The system bounds their numbers, not how many there are (getrlimit(2)).
        """
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        taken = self._numbers()
        free = (number for number in range(hard) if number not in taken)
        bound = hard if more is None else next(itertools.islice(free, more, None))
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (bound, hard))

    def _numbers(self) -> set[int]:
        return {int(entry.name) for entry in Path(f"/proc/{self.pid}/fd").iterdir()}

    def token(self, name: str) -> str:
        return tokens.derive(b"key", "uid", name)

    def context(self, name: str | None) -> ssl.SSLContext:
        """A client's TLS settings, with the certificate of this lease."""
        context = ssl.create_default_context(cadata=self._authority.cert_pem.decode())
        if name is not None:
            leaf = self._authority.issue_client(self.token(name), datetime.now(UTC), self._ends)
            assert leaf.key_pem is not None
            load_chain(context, leaf.cert_pem, leaf.key_pem)
        return context

    def end(self) -> None:
        """Closes it as it would be closed, and looks at what it said."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
            assert self._process.wait(PATIENCE) == 0
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        logged = self.log.read_text()
        assert "Traceback" not in logged
        assert "[error" not in logged
        assert not [name for name in ("good", "bad", "held") if self.token(name) in logged], "a token is in the log"

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


class Client:
    """One connection of a good client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def echo(self, data: bytes = b"as if nothing were") -> None:
        self._writer.write(data)
        assert await self._reader.readexactly(len(data)) == data

    def leave(self) -> None:
        self._writer.transport.abort()


class Under:
    """A gateway under attack, with a client that came before."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._context = served.context("good")
        self._clients: list[Client] = []

    async def client(self) -> Client:
        opened = await asyncio.open_connection(
            "127.0.0.1", self.served.port, ssl=self._context, server_hostname="localhost"
        )
        self._clients.append(Client(*opened))
        return self._clients[-1]

    async def begin(self) -> None:
        """Once through everything, so that what is opened once is open; then the client that stays."""
        (await self.served_client()).leave()
        self.bystander = await self.served_client()
        await self.until(lambda: self.served.counters["active"] == 1)
        self.descriptors, self.memory = self.served.descriptors, self.served.memory

    async def served_client(self) -> Client:
        """A client that got its answer."""
        client = await self.client()
        await client.echo()
        return client

    async def served_soon(self) -> None:
        """Good clients, one after the other, are each served within a second, and the one of before still is."""
        for _ in range(3):
            async with asyncio.timeout(SOON):
                client = await self.served_client()
            client.leave()
        await self.bystander.echo()

    async def over(self) -> None:
        """Every descriptor and every slot is back but the bystander's, and the next client is served."""
        await self.bystander.echo()
        self.end(but=self.bystander)
        await self.until(lambda: self.served.descriptors == self.descriptors)
        assert self.served.counters["active"] == 1
        (await self.served_client()).leave()

    async def until(self, condition: Any, patience: float = PATIENCE) -> None:
        async with asyncio.timeout(patience):
            while not condition():  # noqa: ASYNC110 - another process is looked at
                await asyncio.sleep(0.02)

    def end(self, but: Client | None = None) -> None:
        for client in self._clients:
            if client is not but:
                client.leave()


@pytest.fixture(autouse=True)
def _descriptors_enough() -> Iterator[None]:
    """For the attackers, who are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def limits() -> dict[str, float]:
    """Parametrized by the tests that need others than there are."""
    return {}


@pytest.fixture
async def attacked(tmp_path: Path, limits: dict[str, float]) -> AsyncIterator[Under]:
    """After the test everything that the attack took has been given back."""
    served = await asyncio.to_thread(Served, tmp_path, limits)
    workers: list[asyncio.StreamWriter] = []

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        workers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(work, served.worker)
    under = Under(served)
    try:
        await under.begin()
        yield under
        await under.over()
    finally:
        under.end()
        await asyncio.to_thread(served.end)
        for writer in workers:
            writer.transport.abort()
        server.close()
        await asyncio.sleep(0)
