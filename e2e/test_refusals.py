"""A refused client gets the reason at once, in the output of its own tool."""

from __future__ import annotations

import re
import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.pki.authority import Authority
from harness import WAIT_TIMEOUT, Certificates, eventually, only_on

of_the_gateway = only_on("process", "the gateway judges a certificate without the backend")

MOST_CONNECTIONS = 8
"""buildx makes three if it is answered with a reason. With a closed socket or grpc-status 14 it polls for 20 s, and
makes 24."""
CLOSED = (ssl.SSLError, ConnectionResetError, BrokenPipeError)
"""What a client gets whose handshake failed: the alert, or the end of the connection if it had more to send."""


def _connections(appliance):
    """Returns how many clients have come to the gateway so far."""
    handshakes = re.findall(r"^buildkit_gateway_handshake_seconds_count\S* (\S+)$", appliance.metrics(), re.MULTILINE)
    return sum(map(float, handshakes))


def _refused(appliance, builder, context):
    """Builds, and returns the output of buildx. Checks that it ends at once, without another try."""
    before = _connections(appliance)
    answer = appliance.build(builder, context.dockerfile("say never"))
    assert answer.code != 0
    made = _connections(appliance) - before
    assert 1 <= made <= MOST_CONNECTIONS, answer.text
    return answer.text


def _buildx_output(appliance, certificates, context, name):
    return _refused(appliance, appliance.builder(certificates, name), context)


def _leaf(authority, token, begin=timedelta(), end=timedelta(hours=1)):
    """Returns a client's certificate that is valid between these times from now."""
    now = datetime.now(UTC)
    return authority.issue_client(token, now + begin, now + end)


def _with(certificates, leaf, directory):
    """Returns the same lease with another certificate and key."""
    directory.mkdir()
    (directory / "ca.crt").write_bytes((certificates.directory / "ca.crt").read_bytes())
    (directory / "client.crt").write_bytes(leaf.cert_pem)
    (directory / "client.key").write_bytes(leaf.key_pem)
    return Certificates(directory, certificates.lease)


@pytest.fixture
def authority(appliance):
    return appliance.world.authority(appliance)


def test_a_released_lease_is_refused(appliance, context):
    certificates = appliance.allocate(name="released")
    appliance.release(certificates.lease).ok()
    assert "released" in _buildx_output(appliance, certificates, context, "released")
    appliance.release(certificates.lease).ok()  # a second time is no error


def test_an_expired_lease_is_refused(appliance, context):
    certificates = appliance.allocate("--ttl", "1s", name="expired")
    eventually(
        lambda: (
            appliance.http(
                "POST", "/api/v1/workers/lookup", certificates.lease and {"token": certificates.lease["token"]}
            )[0]
            == 410
        ),
        "expired",
    )
    assert "expired" in _buildx_output(appliance, certificates, context, "expired")


def test_an_unknown_token_is_refused(appliance, context, authority, tmp_path):
    certificates = appliance.allocate(name="known")
    leaf = _leaf(authority, "x" * 43)
    shown = _buildx_output(appliance, _with(certificates, leaf, tmp_path / "unknown"), context, "unknown")
    assert "bkpool allocate" in shown
    appliance.release(certificates.lease)


@of_the_gateway
def test_an_expired_certificate_is_refused_with_a_message_and_not_in_tls(appliance, context, authority, tmp_path):
    certificates = appliance.allocate(name="old")
    leaf = _leaf(authority, certificates.lease["token"], timedelta(minutes=-4), timedelta(minutes=-1))
    shown = _buildx_output(appliance, _with(certificates, leaf, tmp_path / "old-certificate"), context, "old")
    assert "expired" in shown
    appliance.release(certificates.lease)


@of_the_gateway
def test_a_client_without_a_certificate_is_refused(appliance, context):
    endpoint = f"tcp://localhost:{appliance.ports['gateway']}"
    certificates = appliance.allocate(name="none")
    option = f"cacert={certificates.directory}/ca.crt"
    appliance.buildx("create", "--name", "bare", "--driver", "remote", "--driver-opt", option, endpoint).ok()
    assert "certificate" in _refused(appliance, "bare", context)
    appliance.release(certificates.lease)


def _handshake(appliance, authority, chain=None, version=None):
    """Makes a TLS handshake and reads one byte. Raises the error that a client would get."""
    client = ssl.create_default_context(cadata=authority.cert_pem.decode())
    client.set_alpn_protocols(["h2"])
    if version:
        client.maximum_version = version
    if chain:
        client.load_cert_chain(*chain)
    with (
        socket.create_connection(("127.0.0.1", appliance.ports["gateway"]), timeout=WAIT_TIMEOUT) as plain,
        client.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        if not tls.recv(1):
            raise ConnectionResetError


@of_the_gateway
@pytest.mark.parametrize("kind", ["foreign", "server"])
def test_a_certificate_of_another_ca_or_of_a_server_fails_in_tls(appliance, authority, tmp_path, kind):
    now = datetime.now(UTC)
    leaf = (
        _leaf(Authority.create(now), "x" * 43)
        if kind == "foreign"
        else authority.issue_server(["localhost"], [], now, now + timedelta(hours=1))
    )
    (tmp_path / "c.crt").write_bytes(leaf.cert_pem)
    (tmp_path / "c.key").write_bytes(leaf.key_pem)
    with pytest.raises(CLOSED):
        _handshake(appliance, authority, (tmp_path / "c.crt", tmp_path / "c.key"))


@of_the_gateway
def test_tls_1_2_is_refused(appliance, authority):
    with pytest.raises(CLOSED):
        _handshake(appliance, authority, version=ssl.TLSVersion.TLSv1_2)
