"""A gateway in another process, a worker that echoes, and one good client that stays connected all the time."""

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
from harness import WAIT_TIMEOUT

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ESTABLISHED = "01"
"""The state of a connection in /proc/net/tcp."""
MEASURED_CLIENTS = 50
"""Good clients whose CPU time is measured: enough for the 10 ms in which the system counts it."""


class GatewayProcess:
    """The gateway's process, as it can be observed from outside.

    Args:
        directory: For its log and the worker's socket.
        limits: Fields of GatewayLimits.
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
                [sys.executable, HERE / "gateway_process.py"], stdin=pipe, stdout=pipe, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
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
    def unread(self) -> bool:
        """Whether some connection to it has bytes that it has not read."""
        rows = [line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        ours = f"{self.port:04X}"
        return any(row[1].endswith(ours) and row[3] == ESTABLISHED and row[4][-8:] != "00000000" for row in rows)

    @property
    def memory(self) -> int:
        """Bytes of its resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def cpu_seconds(self) -> float:
        """Seconds of CPU time that all its threads have used."""
        times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    @property
    def counters(self) -> dict[str, float]:
        return json.loads(self._ask(""))

    def allow_descriptors(self, more: int | None) -> None:
        """Limits how many more file descriptors it may open.

        The system limits the highest number, not the count (getrlimit(2)).

        Args:
            more: The number of further descriptors; None restores the limit that it started with.
        """
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        used = self._numbers()
        free = (number for number in range(hard) if number not in used)
        limit = hard if more is None else next(itertools.islice(free, more, None))
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (limit, hard))

    def _numbers(self) -> set[int]:
        return {int(entry.name) for entry in Path(f"/proc/{self.pid}/fd").iterdir()}

    def token(self, name: str) -> str:
        return tokens.derive(b"key", "uid", name)

    def context(self, name: str | None) -> ssl.SSLContext:
        """Returns a client's TLS settings, with the certificate of this lease; None for no certificate."""
        context = ssl.create_default_context(cadata=self._authority.cert_pem.decode())
        if name is not None:
            leaf = self._authority.issue_client(self.token(name), datetime.now(UTC), self._ends)
            assert leaf.key_pem is not None
            load_chain(context, leaf.cert_pem, leaf.key_pem)
        return context

    def end(self) -> None:
        """Closes the gateway in order, and checks its log."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
            assert self._process.wait(WAIT_TIMEOUT) == 0
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


class EchoClient:
    """One connection of a good client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def echo(self, data: bytes = b"as if nothing had happened") -> None:
        self._writer.write(data)
        async with asyncio.timeout(WAIT_TIMEOUT):
            assert await self._reader.readexactly(len(data)) == data

    def disconnect(self) -> None:
        self._writer.transport.abort()


class AttackedProcess:
    """A gateway under attack, with a good client that connected before the attack."""

    def __init__(self, process: GatewayProcess) -> None:
        self.process = process
        self._context = process.context("good")
        self._clients: list[EchoClient] = []

    async def client(self) -> EchoClient:
        opened = await asyncio.open_connection(
            "127.0.0.1", self.process.port, ssl=self._context, server_hostname="localhost"
        )
        self._clients.append(EchoClient(*opened))
        return self._clients[-1]

    async def start(self) -> None:
        """Serves a client, so that all that is opened once is open. Then connects the client that stays."""
        (await self.served_client()).disconnect()
        self.earlier_client = await self.served_client()
        await self.wait_until(lambda: self.process.counters["active"] == 1)
        self.descriptors, self.memory = self.process.descriptors, self.process.memory

    async def served_client(self) -> EchoClient:
        """Connects a client and waits for its answer."""
        client = await self.client()
        await client.echo()
        return client

    async def serves_good_clients(self, count: int = 3) -> None:
        """Checks that this many good clients in a row are served, and that the earlier one still is."""
        for _ in range(count):
            (await self.served_client()).disconnect()
        await self.earlier_client.echo()

    async def cpu_seconds_of_a_good_client(self) -> float:
        """Measures the CPU time that the gateway uses for a good client, on this machine as busy as it is now."""
        before = self.process.cpu_seconds
        await self.serves_good_clients(MEASURED_CLIENTS)
        return (self.process.cpu_seconds - before) / MEASURED_CLIENTS

    async def check_all_freed(self) -> None:
        """Checks that only the earlier client holds descriptors and a slot, and that the next client is served."""
        await self.earlier_client.echo()
        self.disconnect_all(but=self.earlier_client)
        await self.wait_until(lambda: self.process.descriptors == self.descriptors)
        await self.wait_until(lambda: self.process.counters["active"] == 1)
        (await self.served_client()).disconnect()

    async def wait_until(self, condition: Any, seconds: float = WAIT_TIMEOUT) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - polls another process
                await asyncio.sleep(0.02)

    def disconnect_all(self, but: EchoClient | None = None) -> None:
        for client in self._clients:
            if client is not but:
                client.disconnect()


@pytest.fixture(autouse=True)
def _enough_descriptors() -> Iterator[None]:
    """The attackers are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def limits() -> dict[str, float]:
    """Fields of GatewayLimits; replaced by tests that need other limits."""
    return {}


@pytest.fixture
async def attacked(tmp_path: Path, limits: dict[str, float]) -> AsyncIterator[AttackedProcess]:
    """A gateway to attack. After the test, everything that the attack used must be free again."""
    process = await asyncio.to_thread(GatewayProcess, tmp_path, limits)
    workers: list[asyncio.StreamWriter] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        workers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(echo, process.worker)
    attacked = AttackedProcess(process)
    try:
        await attacked.start()
        yield attacked
        await attacked.check_all_freed()
    finally:
        attacked.disconnect_all()
        await asyncio.to_thread(process.end)
        for writer in workers:
            writer.transport.abort()
        server.close()
        await asyncio.sleep(0)
