"""A worker's Control API without a buildkitd behind it, over a Unix socket or mutual TLS."""
# ruff: noqa: N802 - the methods are named as BuildKit names its calls

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from grpclib.server import Server, Stream

from bkpool.buildkit import WorkerTls
from bkpool.buildkit.stubs import control_pb2 as pb
from bkpool.buildkit.stubs.control_grpc import ControlBase
from bkpool.pki.authority import Authority
from bkpool.pki.worker_tls import worker_context

NOW = datetime.now(UTC)
BACKEND = Authority.create(NOW)


@dataclass
class StubControl(ControlBase):
    """A Control API that answers as a test configures it. It records requests and cancelled streams."""

    events: list[pb.BuildHistoryEvent] = field(default_factory=list)
    usage: list[pb.UsageRecord] = field(default_factory=list)
    version: pb.BuildkitVersion = field(default_factory=pb.BuildkitVersion)
    workers: list[pb.WorkerRecord] = field(default_factory=list)
    failure: Exception | None = None
    """Raised by every call."""
    stalled: bool = False
    """Unary calls are never answered, and streams never end."""
    requests: list[object] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    transports: list[asyncio.Transport] = field(default_factory=list)
    """The transport of each call, so that a test can break its connection."""

    async def Info(self, stream: Stream[pb.InfoRequest, pb.InfoResponse]) -> None:
        await self._receive(stream)
        await self._stall()
        await stream.send_message(pb.InfoResponse(buildkitVersion=self.version))

    async def ListWorkers(self, stream: Stream[pb.ListWorkersRequest, pb.ListWorkersResponse]) -> None:
        await self._receive(stream)
        await self._stall()
        await stream.send_message(pb.ListWorkersResponse(record=self.workers))

    async def DiskUsage(self, stream: Stream[pb.DiskUsageRequest, pb.DiskUsageResponse]) -> None:
        await self._receive(stream)
        await self._stall()
        await stream.send_message(pb.DiskUsageResponse(record=self.usage))

    async def Prune(self, stream: Stream[pb.PruneRequest, pb.UsageRecord]) -> None:
        await self._receive(stream)
        for record in self.usage:
            await stream.send_message(record)
        await self._stall()

    async def ListenBuildHistory(self, stream: Stream[pb.BuildHistoryRequest, pb.BuildHistoryEvent]) -> None:
        await self._receive(stream)
        for event in self.events:
            await stream.send_message(event)
        await self._stall()

    async def UpdateBuildHistory(
        self, stream: Stream[pb.UpdateBuildHistoryRequest, pb.UpdateBuildHistoryResponse]
    ) -> None:
        await self._receive(stream)
        await self._stall()
        await stream.send_message(pb.UpdateBuildHistoryResponse())

    async def _receive(self, stream: Stream[Any, Any]) -> None:
        self.requests.append(await stream.recv_message())
        self.transports.append(stream._stream._transport)
        self.called.set()
        if self.failure is not None:
            raise self.failure

    async def _stall(self) -> None:
        if self.stalled:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise


@contextlib.asynccontextmanager
async def serve(control: ControlBase, **where: Any) -> AsyncIterator[Server]:
    """Runs a server. Afterwards all its connections are closed."""
    server = Server([control])
    await server.start(**where)
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


def server_context(directory: Path) -> ssl.SSLContext:
    """Returns the TLS settings of a worker with uid uid-1. It accepts certificates of the backend's authority."""
    leaf = BACKEND.issue_worker("uid-1", NOW)
    (directory / "both.pem").write_bytes((leaf.key_pem or b"") + leaf.cert_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "both.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=BACKEND.cert_pem.decode())
    context.set_alpn_protocols(["h2"])
    return context


def tls(worker_uid: str = "uid-1", authority: Authority = BACKEND) -> WorkerTls:
    leaf = authority.issue_dialler("test", NOW, NOW + timedelta(hours=1))
    return WorkerTls(worker_context(leaf.cert_pem, leaf.key_pem or b"", BACKEND.cert_pem), worker_uid)
