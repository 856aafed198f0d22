"""The appliance gets a stop signal while a stream through its gateway is open: it waits, up to a deadline.

The stream is a TLS connection to a real buildkitd, so that only the gateway decides when it ends.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import ssl
import time

import pytest

from harness import eventually, only_on, pool

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # and SETTINGS: RFC 9113 section 3.4
STOP_TIMEOUT = 60.0
"""Seconds that an appliance may take to end: much less than the longest drain of these tests."""

pytestmark = only_on("process", "the appliance is a process of this machine")


class Stream:
    """One connection to the worker of a lease, through the gateway."""

    def __init__(self, appliance, certificates):
        self._address = ("127.0.0.1", appliance.ports["gateway"])
        self._context = ssl.create_default_context(cafile=certificates.directory / "ca.crt")
        self._context.load_cert_chain(certificates.directory / "client.crt", certificates.directory / "client.key")
        self._context.set_alpn_protocols(["h2"])
        self._sock = self._context.wrap_socket(socket.create_connection(self._address), server_hostname="localhost")
        self._sock.settimeout(STOP_TIMEOUT)
        self._sock.sendall(PREFACE)
        assert self._sock.recv(9)[3] == 4, "buildkitd's own SETTINGS"
        self._sock.sendall(b"\0\0\0\4\1\0\0\0\0")

    def answers_ping(self):
        """Returns whether buildkitd answers a PING (RFC 9113 section 6.7)."""
        self._sock.sendall(b"\0\0\x08\6\0\0\0\0\0" + b"are-here")
        received = b""
        with contextlib.suppress(ConnectionError):
            while b"are-here" not in received and (part := self._sock.recv(4096)):
                received += part
        return b"are-here" in received

    def wait_for_end(self):
        with contextlib.suppress(ConnectionError):
            while self._sock.recv(4096):
                pass

    def refuses_new_connections(self):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(self._address):
            return False
        return True

    def close(self):
        self._sock.close()


@pytest.fixture
def start_with_stream(make_appliance):
    """Starts an appliance in the foreground with a lease and an open stream; returns its process and the stream."""
    streams = []

    def start(*options):
        appliance = make_appliance()
        objects = appliance.base / "objects.yaml"
        objects.write_text(json.dumps(pool("default", scaling={"max": 1})))  # JSON is YAML
        addresses = [
            part for name, port in appliance.ports.items() for part in (f"--{name}-address", f"127.0.0.1:{port}")
        ]
        process = appliance.start(
            *appliance.program, "up", "-f", objects, *appliance.world.options(), *addresses, *options
        )
        eventually((appliance.home / "appliance.json").exists, "the appliance is up")
        streams.append(Stream(appliance, appliance.allocate()))
        assert streams[-1].answers_ping()
        return process, streams[-1]

    yield start
    for stream in streams:
        stream.close()


def start_drain(process, stream):
    process.send_signal(signal.SIGTERM)
    eventually(stream.refuses_new_connections, "the gateway accepts no connection")


def exit_code(process, within=STOP_TIMEOUT):
    process.communicate(timeout=within)
    return process.returncode


def test_sigterm_lets_an_open_stream_finish_and_then_the_exit_code_is_0(start_with_stream):
    process, stream = start_with_stream("--drain-timeout", "10m")
    start_drain(process, stream)
    assert stream.answers_ping()
    assert process.poll() is None
    stream.close()
    assert exit_code(process) == 0


def test_the_deadline_of_a_drain_cuts_an_open_stream_and_the_exit_code_is_0(start_with_stream):
    process, stream = start_with_stream("--drain-timeout", "2s")
    started_at = time.monotonic()
    start_drain(process, stream)
    stream.wait_for_end()
    assert time.monotonic() - started_at >= 2
    assert exit_code(process) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_cuts_an_open_stream_at_once_and_the_exit_code_is_0(start_with_stream, second):
    process, stream = start_with_stream("--drain-timeout", "10m")
    start_drain(process, stream)
    assert stream.answers_ping()
    process.send_signal(second)
    stream.wait_for_end()
    assert exit_code(process) == 0
