"""A client of a gateway, after its TLS handshake: bytes that are echoed, and one gRPC call over HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events

_WAIT = 60.0
"""Seconds that a read to the end may take before the test fails."""


class GatewayClient:
    """One connection of a client to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.goaway = False
        """Whether the gateway has sent GOAWAY."""

    async def echo(self, data: bytes) -> None:
        """Sends this, and expects it back."""
        self.writer.write(data)
        assert await self.reader.readexactly(len(data)) == data

    async def call(self) -> tuple[int, str]:
        """Makes one gRPC call, and returns its status code and message."""
        self.start_call()
        return await self.call_result()

    def start_call(self) -> None:
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._http.initiate_connection()
        request = [(":method", "POST"), (":scheme", "https"), (":path", "/moby.buildkit.v1.Control/Info")]
        self._http.send_headers(1, [*request, (":authority", "localhost"), ("content-type", "application/grpc")])
        self._http.send_data(1, b"\0\0\0\0\0", end_stream=True)
        self.writer.write(self._http.data_to_send())

    async def call_result(self) -> tuple[int, str]:
        """Reads to the end of the connection, and returns status code and message of the call."""
        headers: dict[str, str] = {}
        async with asyncio.timeout(_WAIT):
            while data := await self.reader.read(65536):
                for event in self._http.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        headers = {str(name): str(value) for name, value in event.headers}
                    self.goaway |= isinstance(event, h2.events.ConnectionTerminated)
        assert headers[":status"] == "200"
        assert headers["content-type"] == "application/grpc"
        return int(headers["grpc-status"]), unquote(headers["grpc-message"])

    async def read_to_end(self) -> bytes:
        """Returns the remaining bytes of the connection, whether it ends well or with a reset."""
        received = bytearray()
        async with asyncio.timeout(_WAIT):
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(65536):
                    received += data
        return bytes(received)
