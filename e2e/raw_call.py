"""A client that makes one call through the gateway and tells exactly what came back, and when."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events

from harness import WAIT_TIMEOUT


@dataclass
class Outcome:
    """How a connection ended."""

    silence: float
    """Seconds from the beginning of the connection to the first byte of an answer."""
    code: int
    message: str
    goaway: bool


def call(appliance, certificates, timeout=WAIT_TIMEOUT):
    """Opens a connection, calls Control.Info as buildx does, and reads to the end.

    Returns:
        The answer; None if the connection ended without one.
    """
    directory = certificates.directory
    context = ssl.create_default_context(cafile=directory / "ca.crt")
    context.load_cert_chain(directory / "client.crt", directory / "client.key")
    context.set_alpn_protocols(["h2"])
    http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    http.initiate_connection()
    request = [(":method", "POST"), (":scheme", "https"), (":path", "/moby.buildkit.v1.Control/Info")]
    http.send_headers(1, [*request, (":authority", "localhost"), ("content-type", "application/grpc")])
    http.send_data(1, b"\0\0\0\0\0", end_stream=True)
    events, silence, begun = [], None, time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", appliance.ports["gateway"]), timeout=timeout) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(http.data_to_send())
        with contextlib.suppress(ConnectionResetError):
            while data := tls.recv(65536):
                silence = silence or time.monotonic() - begun
                events += http.receive_data(data)
    answer = next((dict(event.headers) for event in events if isinstance(event, h2.events.ResponseReceived)), None)
    if answer is None:
        return None
    goaway = any(isinstance(event, h2.events.ConnectionTerminated) for event in events)
    return Outcome(silence, int(answer["grpc-status"]), unquote(answer["grpc-message"]), goaway)
