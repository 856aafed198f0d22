from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived, StreamEnded

from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.pki.authority import Authority
from bkpool.pki.worker_tls import worker_context
from bkpool.workers.probe import probe, probe_tls
from support.descriptors import descriptors_left


@pytest.fixture
def socket() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp())  # tmp_path may be too long for a socket
    yield directory / "s"
    shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def listening(socket: Path, answer) -> AsyncIterator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, socket)
    async with server:
        yield


def grpc(*trailers: tuple[str, str], body: bytes = b"\0\0\0\0\0"):
    """Answers as a gRPC server does: headers, a message, and the status in the trailers."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                if isinstance(event, RequestReceived):
                    assert dict(event.headers)[":path"] == "/moby.buildkit.v1.Control/ListWorkers"
                if isinstance(event, StreamEnded):
                    connection.send_headers(
                        event.stream_id, [(":status", "200"), ("content-type", "application/grpc")]
                    )
                    connection.send_data(event.stream_id, body)
                    connection.send_headers(event.stream_id, list(trailers), end_stream=True)
            writer.write(connection.data_to_send())
            await writer.drain()

    return answer


async def test_ok_gives_the_process_behind_the_socket(socket):
    async with listening(socket, grpc(("grpc-status", "0"))):
        assert await probe(socket) == os.getpid()


@pytest.mark.parametrize("status", ["12", "14"])
async def test_any_other_status_is_not_ready(socket, status):
    async with listening(socket, grpc(("grpc-status", status))):
        with pytest.raises(WorkerFailed, match=f"grpc-status {status}"):
            await probe(socket)


async def test_a_socket_that_is_missing_is_unavailable(socket):
    with pytest.raises(Unavailable, match="No such file"):
        await probe(socket)


async def test_one_that_hangs_up_is_not_ready(socket):
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with listening(socket, hang_up):
        with pytest.raises(Unavailable):
            await probe(socket)


async def test_a_breach_of_http2_is_named(socket):
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(9))  # a DATA frame on stream 0, which cannot carry any
        await reader.read()

    async with listening(socket, talk):
        with pytest.raises(WorkerFailed, match="does not speak HTTP/2"):
            await probe(socket)


# --- over mTLS ------------------------------------------------------------------------------------------------------

NOW = datetime.now(UTC)
BACKEND = Authority.create(NOW)


def dialler(authority: Authority = BACKEND) -> ssl.SSLContext:
    leaf = authority.issue_dialler("test", NOW, NOW + timedelta(hours=1))
    return worker_context(leaf.cert_pem, leaf.key_pem, BACKEND.cert_pem)


@contextlib.asynccontextmanager
async def worker(tmp_path: Path, answer) -> AsyncIterator[int]:
    """A server with the identity of worker uid-1 that believes diallers; its port."""
    leaf = BACKEND.issue_worker("uid-1", NOW)
    (tmp_path / "both.pem").write_bytes(leaf.key_pem + leaf.cert_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=BACKEND.cert_pem.decode())
    context.set_alpn_protocols(["h2"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await answer(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_worker_answers_over_tls(tmp_path):
    async with worker(tmp_path, grpc(("grpc-status", "0"))) as port:
        await probe_tls("127.0.0.1", port, dialler(), "uid-1")


async def test_another_worker_on_that_port_is_not_taken_for_this_one(tmp_path):
    async with worker(tmp_path, grpc(("grpc-status", "0"))) as port:
        with pytest.raises(WorkerFailed, match="uid-2"):
            await probe_tls("127.0.0.1", port, dialler(), "uid-2")


async def test_a_refused_dialler_and_a_closed_port_are_no_answer(tmp_path):
    async with worker(tmp_path, grpc(("grpc-status", "0"))) as port:
        with pytest.raises(Unavailable):
            await probe_tls("127.0.0.1", port, dialler(Authority.create(NOW)), "uid-1")
    with pytest.raises(Unavailable):
        await probe_tls("127.0.0.1", port, dialler(), "uid-1")


async def test_a_proxy_that_takes_the_connection_and_hangs_up_is_unavailable():
    """Docker's, while nothing listens behind it."""

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        with pytest.raises(Unavailable):
            await probe_tls("127.0.0.1", server.sockets[0].getsockname()[1], dialler(), "uid-1")


async def test_a_lack_of_descriptors_is_not_the_workers_fault(socket):
    async def never(_reader, _writer):
        raise AssertionError("nobody can connect")

    async with listening(socket, never):
        with descriptors_left(0), pytest.raises(HostFault, match="cannot be asked: there are too many open files"):
            await probe(socket)
