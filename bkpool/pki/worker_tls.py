"""TLS from a gateway or a probe to a worker, and how a worker is known: by the uid in its certificate.

Addresses are not names: a pod's or a host's port may be another's by now, so no host name is ever compared. Nothing
here connects anywhere.
"""

from __future__ import annotations

import ssl

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bkpool.core.errors import HostFault, WorkerFailed
from bkpool.pki.authority import worker_uri
from bkpool.pki.chain import load_chain


def worker_context(cert_pem: bytes, key_pem: bytes, backend_ca_pem: bytes) -> ssl.SSLContext:
    """The TLS settings of whoever dials workers; `check_worker` must follow every handshake with them.

    For `asyncio.open_connection(host, port, ssl=context)` as well as for the gateway's own TLS.

    Args:
        cert_pem: The dialler's certificate (Authority.issue_dialler).
        key_pem: The certificate's key.
        backend_ca_pem: The authority of the workers' certificates, and of no others.

    Raises:
        HostFault: `Unreadable`: one of them is damaged, or the key is not the certificate's.
    """
    try:
        return _context(cert_pem, key_pem, backend_ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise HostFault(
            f"the certificate for dialling workers cannot be used: {error}",
            hint="Delete the Secret of the gateway that it is in: the controller issues it again.",
            code="Unreadable",
        ) from None


def _context(cert_pem: bytes, key_pem: bytes, backend_ca_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])  # buildkitd is grpc-go, which hangs up on clients that do not offer it
    context.load_verify_locations(cadata=backend_ca_pem.decode("ascii"))
    load_chain(context, cert_pem, key_pem, backend_ca_pem)
    return context


def check_worker(peer_cert_der: bytes | None, worker_uid: str) -> None:
    """Checks that a certificate, whose chain TLS has verified, is this worker's.

    Args:
        peer_cert_der: What the peer presented (`getpeercert(binary_form=True)`).
        worker_uid: The uid of the worker that was dialled.

    Raises:
        WorkerFailed: It is not; the code is WrongWorker.
    """
    if peer_cert_der is None:
        raise _wrong(worker_uid, "it has no certificate")
    try:
        extensions = x509.load_der_x509_certificate(peer_cert_der).extensions
        uses = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except Exception:  # noqa: BLE001 - whatever is missing or malformed in it, it is not a worker's
        raise _wrong(worker_uid, "its certificate is not one of a worker") from None
    if ExtendedKeyUsageOID.SERVER_AUTH not in uses:
        raise _wrong(worker_uid, "its certificate is not for servers")
    if uris != [worker_uri(worker_uid)]:
        raise _wrong(worker_uid, f"its certificate is for {', '.join(uris) or 'no worker'}")


def _wrong(worker_uid: str, why: str) -> WorkerFailed:
    return WorkerFailed(
        f"what answers is not the worker with uid {worker_uid}: {why}",
        hint="Its address may have become another's; `bkpool status` says where the worker is.",
        code="WrongWorker",
    )
