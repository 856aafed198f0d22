"""TLS from a gateway or a probe to a worker (mTLS with the backend CA), and the check that it is the right worker.

A worker is recognized by the uid in its certificate. Host names are never compared, because another pod may have got
a worker's address meanwhile. Nothing here opens a connection.
"""

from __future__ import annotations

import ssl

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bkpool.core.errors import HostFault, WorkerFailed
from bkpool.pki.authority import worker_uri
from bkpool.pki.chain import load_chain


def worker_context(cert_pem: bytes, key_pem: bytes, backend_ca_pem: bytes) -> ssl.SSLContext:
    """The TLS settings for connections to workers. After every handshake, call `check_worker`.

    For `asyncio.open_connection(host, port, ssl=context)` as well as for the gateway's own TLS.

    Args:
        cert_pem: The client certificate (Authority.issue_dialler).
        key_pem: The certificate's key.
        backend_ca_pem: The CA of the workers' certificates only.

    Raises:
        HostFault: `Unreadable`: one of them is damaged, or the key does not belong to the certificate.
    """
    try:
        return _context(cert_pem, key_pem, backend_ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise HostFault(
            f"the client certificate for connections to workers cannot be used: {error}",
            hint="Delete the gateway's Secret that contains it; the controller then issues it again.",
            code="Unreadable",
        ) from None


def _context(cert_pem: bytes, key_pem: bytes, backend_ca_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])  # buildkitd uses grpc-go, which rejects clients without ALPN
    context.load_verify_locations(cadata=backend_ca_pem.decode("ascii"))
    load_chain(context, cert_pem, key_pem, backend_ca_pem)
    return context


def check_worker(peer_cert_der: bytes | None, worker_uid: str) -> None:
    """Checks that a certificate belongs to this worker. TLS has verified its chain already.

    Args:
        peer_cert_der: What the peer presented (`getpeercert(binary_form=True)`).
        worker_uid: The uid of the worker that was dialled.

    Raises:
        WorkerFailed: It does not; the code is WrongWorker.
    """
    if peer_cert_der is None:
        raise _wrong(worker_uid, "it has no certificate")
    try:
        extensions = x509.load_der_x509_certificate(peer_cert_der).extensions
        uses = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except Exception:  # noqa: BLE001 - whatever is missing or malformed: it is not a worker's certificate
        raise _wrong(worker_uid, "its certificate is not a worker's") from None
    if ExtendedKeyUsageOID.SERVER_AUTH not in uses:
        raise _wrong(worker_uid, "its certificate is not for a server")
    if uris != [worker_uri(worker_uid)]:
        raise _wrong(worker_uid, f"its certificate is for {', '.join(uris) or 'no worker'}")


def _wrong(worker_uid: str, why: str) -> WorkerFailed:
    return WorkerFailed(
        f"the server at this address is not the worker with uid {worker_uid}: {why}",
        hint="Another process may have got the worker's address; `bkpool status` shows where the worker is.",
        code="WrongWorker",
    )
