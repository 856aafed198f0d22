"""A refused client gets the reason at once, in the output of its own tool."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.pki.authority import Authority
from harness import Certificates, eventually

AT_ONCE = 2.0  # seconds; with a closed socket or grpc-status 14 buildx would take 20
NOW = datetime.now(UTC)


def _buildx_output(appliance, certificates, context, name):
    """Returns the output of buildx, and checks that it ends at once."""
    builder = appliance.builder(certificates, name)
    answer = appliance.build(builder, context.dockerfile("say never"))
    assert answer.code != 0
    assert answer.seconds < AT_ONCE, answer.text
    return answer.text


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
    leaf = authority.issue_client("x" * 43, NOW, NOW + timedelta(hours=1))
    shown = _buildx_output(appliance, _with(certificates, leaf, tmp_path / "unknown"), context, "unknown")
    assert "bkpool allocate" in shown
    appliance.release(certificates.lease)


def test_an_expired_certificate_is_refused_with_a_message_and_not_in_tls(appliance, context, authority, tmp_path):
    certificates = appliance.allocate(name="old")
    now = datetime.now(UTC)
    leaf = authority.issue_client(certificates.lease["token"], now - timedelta(minutes=4), now - timedelta(minutes=1))
    shown = _buildx_output(appliance, _with(certificates, leaf, tmp_path / "old-certificate"), context, "old")
    assert "expired" in shown
    appliance.release(certificates.lease)


def test_a_client_without_a_certificate_is_refused(appliance, context):
    endpoint = f"tcp://localhost:{appliance.ports['gateway']}"
    certificates = appliance.allocate(name="none")
    option = f"cacert={certificates.directory}/ca.crt"
    appliance.buildx("create", "--name", "bare", "--driver", "remote", "--driver-opt", option, endpoint).ok()
    answer = appliance.build("bare", context.dockerfile("say never"))
    assert answer.code != 0
    assert answer.seconds < AT_ONCE, answer.text
    assert "certificate" in answer.text
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
        socket.create_connection(("127.0.0.1", appliance.ports["gateway"]), timeout=5) as plain,
        client.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        if not tls.recv(1):
            raise ConnectionResetError


@pytest.mark.parametrize("kind", ["foreign", "server"])
def test_a_certificate_of_another_ca_or_of_a_server_fails_in_tls(appliance, authority, tmp_path, kind):
    signer = Authority.create(NOW) if kind == "foreign" else authority
    leaf = (
        signer.issue_client("x" * 43, NOW, NOW + timedelta(hours=1))
        if kind == "foreign"
        else signer.issue_server(["localhost"], [], NOW, NOW + timedelta(hours=1))
    )
    (tmp_path / "c.crt").write_bytes(leaf.cert_pem)
    (tmp_path / "c.key").write_bytes(leaf.key_pem)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        _handshake(appliance, authority, (tmp_path / "c.crt", tmp_path / "c.key"))


def test_tls_1_2_is_refused(appliance, authority):
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        _handshake(appliance, authority, version=ssl.TLSVersion.TLSv1_2)
