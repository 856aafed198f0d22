"""TLS 1.3 between a worker and its clients, in memory: which certificates each side accepts."""

from __future__ import annotations

import ssl
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from bkpool.core import tokens
from bkpool.core.errors import HostFault, WorkerFailed
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from bkpool.pki.worker_tls import check_worker, worker_context

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
UID = "0b8ce2d5-0000-4000-8000-000000000001"


@pytest.fixture(scope="module")
def ca():
    return Authority.create(NOW, name="bkpool backend CA")


@pytest.fixture(scope="module")
def client_ca():
    return Authority.create(NOW)


def as_buildkitd(leaf, ca) -> ssl.SSLContext:
    """Like buildkitd with --tlscacert: it has its own certificate and requires client certificates of that CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=ca.cert_pem.decode())
    load_chain(context, leaf.cert_pem, leaf.key_pem)
    return context


def meet(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """The client's side after the handshake, in memory. Raises the error of either side."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(down, up)
    theirs = server.wrap_bio(up, down, server_side=True)
    open_ends = [ours, theirs]
    for _ in range(4):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not open_ends
    return ours


def settings(ca, leaf=None) -> ssl.SSLContext:
    leaf = leaf or ca.issue_dialler("default/p", NOW, NOW + DAY)
    return worker_context(leaf.cert_pem, leaf.key_pem, ca.cert_pem)


def der(leaf) -> bytes:
    return x509.load_pem_x509_certificate(leaf.cert_pem).public_bytes(Encoding.DER)


def test_a_worker_is_recognized_by_its_uid_and_accepts_a_gateway(ca):
    met = meet(as_buildkitd(ca.issue_worker(UID, NOW), ca), settings(ca))
    assert met.version() == "TLSv1.3"
    assert met.selected_alpn_protocol() == "h2"
    check_worker(met.getpeercert(binary_form=True), UID)
    with pytest.raises(
        WorkerFailed, match=f"not the worker with uid another: its certificate is for .*{UID}"
    ) as caught:
        check_worker(met.getpeercert(binary_form=True), "another")
    assert caught.value.code == "WrongWorker"


def test_a_worker_refuses_certificates_of_clients_and_of_other_workers(ca, client_ca):
    server = as_buildkitd(ca.issue_worker(UID, NOW), ca)
    lease = client_ca.issue_client(tokens.derive(b"k" * 32, UID, "a"), NOW, NOW + DAY)
    for leaf, says in (
        (lease, "(?i)unknown.ca|verify failed"),
        (client_ca.issue_dialler("default/p", NOW, NOW + DAY), "verify failed"),
        (ca.issue_worker("another", NOW), "unsuitable certificate purpose"),
    ):
        client = settings(ca, leaf)
        with pytest.raises(ssl.SSLError, match=says):
            meet(server, client)


def test_no_other_certificate_is_accepted_as_a_worker(ca, client_ca):
    dialler = ca.issue_dialler(UID, NOW, NOW + DAY)
    gateway = client_ca.issue_server(["localhost"], [], NOW, NOW + DAY)
    for leaf, says in (
        (gateway, "self.signed|unable to get local issuer"),
        (dialler, "unsuitable certificate purpose"),
    ):
        with pytest.raises(ssl.SSLCertVerificationError, match=says):
            meet(as_buildkitd(leaf, ca), settings(ca))
    for leaf, says in (
        (dialler, "not for a server"),
        (ca.issue_server([UID], [], NOW, NOW + DAY), "is for no worker"),
        (ca.issue_worker(UID + "/x", NOW), "is for buildkit://worker/"),
    ):
        with pytest.raises(WorkerFailed, match=says):
            check_worker(der(leaf), UID)
    for nothing in (None, b"", b"nonsense", der_of_an_authority(ca)):
        with pytest.raises(WorkerFailed, match="certificate"):
            check_worker(nothing, UID)


def der_of_an_authority(ca) -> bytes:
    return x509.load_pem_x509_certificate(ca.cert_pem).public_bytes(Encoding.DER)


def test_tls_1_2_is_refused(ca):
    old = as_buildkitd(ca.issue_worker(UID, NOW), ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        meet(old, settings(ca))


def test_openssl_shows_the_name_in_each_certificate(ca):
    for leaf, subject, uri in (
        (ca.issue_worker(UID, NOW), f"bkpool worker {UID}", f"buildkit://worker/{UID}"),
        (ca.issue_dialler("default/p", NOW, NOW + DAY), "bkpool dialler default/p", "buildkit://gateway/default/p"),
    ):
        command = ["openssl", "x509", "-noout", "-subject", "-issuer", "-ext", "subjectAltName"]
        shown = subprocess.run(command, input=leaf.cert_pem, capture_output=True, check=True).stdout.decode()
        assert f"subject=CN = {subject}\n" in shown
        assert "issuer=CN = bkpool backend CA " in shown
        assert f"URI:{uri}\n" in shown


def test_each_certificate_has_one_use_and_a_workers_is_valid_as_long_as_its_ca(ca):
    worker = x509.load_pem_x509_certificate(ca.issue_worker(UID, NOW).cert_pem)
    dialler = x509.load_pem_x509_certificate(ca.issue_dialler("n" * 300, NOW, NOW + DAY).cert_pem)
    assert worker.not_valid_after_utc == ca.not_after
    assert dialler.not_valid_after_utc == NOW + DAY
    for cert, use in ((worker, ExtendedKeyUsageOID.SERVER_AUTH), (dialler, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [use]


def test_damaged_or_mismatched_files_are_refused(ca):
    one, other = (ca.issue_dialler("a", NOW, NOW + DAY) for _ in range(2))
    for cert, key, authority in (
        (one.cert_pem, other.key_pem, ca.cert_pem),
        (one.cert_pem, b"", ca.cert_pem),
        (one.cert_pem, one.key_pem, "\u00fc".encode()),
    ):
        with pytest.raises(
            HostFault, match="the client certificate for connections to workers cannot be used"
        ) as caught:
            worker_context(cert, key, authority)
        assert caught.value.code == "Unreadable"
