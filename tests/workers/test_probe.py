from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived, StreamEnded

from bkpool.core.errors import WorkerFailed
from bkpool.workers.probe import probe


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
                    connection.send_headers(event.stream_id, [(":status", "200")])
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


async def test_nobody_there_is_an_os_error(socket):
    with pytest.raises(FileNotFoundError):
        await probe(socket)


async def test_one_that_hangs_up_is_not_ready(socket):
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with listening(socket, hang_up):
        with pytest.raises((WorkerFailed, OSError)):
            await probe(socket)


async def test_a_breach_of_http2_is_named(socket):
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(9))  # a DATA frame on stream 0, which can't carry any
        await reader.read()

    async with listening(socket, talk):
        with pytest.raises(WorkerFailed, match="does not speak HTTP/2"):
            await probe(socket)
