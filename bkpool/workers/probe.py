"""Asks buildkitd itself whether it is ready: one gRPC call over its Unix socket, or over mTLS (DESIGN rule 9).

Speaks just enough HTTP/2 for a unary call with an empty request. It never judges a worker by its process or its
socket file, and leaves deadlines to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError

from bkpool.core.errors import WorkerFailed
from bkpool.pki.worker_tls import check_worker

# What buildx itself calls first, so that whoever passes this passes buildx: moby/buildkit api/services/control.
_METHOD = "/moby.buildkit.v1.Control/ListWorkers"
_EMPTY_MESSAGE = b"\0\0\0\0\0"  # not compressed, length 0: the framing of gRPC over HTTP/2
_REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", _METHOD),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
_PEERCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_READ = 64 * 1024


async def probe(path: Path) -> int:
    """Makes one call and returns the process id behind the socket, as this process sees it.

    Raises:
        WorkerFailed: What listens there did not answer the call with OK.
        OSError: Nothing listens there.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        await _ask(reader, writer, str(path))
        return _peer(writer.get_extra_info("socket"))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def probe_tls(host: str, port: int, context: ssl.SSLContext, worker_uid: str) -> None:
    """Makes one call to a worker's port.

    Args:
        host: An IP address.
        port: Where buildkitd, or a proxy before it, listens.
        context: Of `pki.worker_tls.worker_context`.
        worker_uid: Of the worker that should answer.

    Raises:
        WorkerFailed: What listens there is another worker, or did not answer the call with OK.
        OSError: Nothing listens there, or what does so hangs up or does not speak our TLS.
    """
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        check_worker(writer.get_extra_info("ssl_object").getpeercert(binary_form=True), worker_uid)
        await _ask(reader, writer, f"{host}:{port}")
    finally:
        writer.transport.abort()  # a closing handshake with a peer that hangs would take half a minute
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: str) -> None:
    try:
        status = await _call(reader, writer)
    except ProtocolError as error:
        raise WorkerFailed(f"what listens on {place} does not speak HTTP/2: {error}") from None
    if status != "0":
        raise WorkerFailed(f"buildkitd answered a health call with grpc-status {status or 'none'}")


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    connection = H2Connection(H2Configuration(header_encoding=None))
    connection.initiate_connection()
    stream = connection.get_next_available_stream_id()
    connection.send_headers(stream, _REQUEST)
    connection.send_data(stream, _EMPTY_MESSAGE, end_stream=True)
    status = ""
    while True:
        writer.write(connection.data_to_send())
        await writer.drain()
        data = await reader.read(_READ)
        if not data:
            return status
        for event in connection.receive_data(data):
            status = _status(event) or status
            if isinstance(event, DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, stream)
            if isinstance(event, StreamEnded | StreamReset | ConnectionTerminated):
                return status


def _status(event: Event) -> str:
    """The grpc-status, which stands in the trailers, or in the headers of an answer without a body."""
    if not isinstance(event, ResponseReceived | TrailersReceived):
        return ""
    return dict(event.headers or ()).get(b"grpc-status", b"").decode("ascii", "replace")


def _peer(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    return int(_PEERCRED.unpack(credentials)[0])
