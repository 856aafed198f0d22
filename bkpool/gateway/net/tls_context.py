"""The gateway's TLS settings: TLS 1.3, client certificates of our CA asked for, no tickets.

Of a certificate's faults only a foreign CA fails in TLS; a missing or outdated one is let through here, so that
`certificate` can answer it with a sentence.
"""

from __future__ import annotations

import ssl
import sys

from bkpool.gateway.net.duplex import SniSSLObject
from bkpool.pki.chain import load_chain

_NO_CHECK_TIME = ssl.VerifyFlags(
    0x200000
)  # X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h); Python has no name for it


def server_context(cert_pem: bytes, key_pem: bytes, ca_pem: bytes) -> ssl.SSLContext:
    """The context for accepted connections.

    Args:
        cert_pem: The gateway's certificate, with its chain if it has one.
        key_pem: The certificate's key.
        ca_pem: The CA of the clients' certificates.

    Raises:
        ssl.SSLError: One of them is unreadable, or the key is not the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # a third of a handshake's time, and a resumed session would skip the certificate
    context.set_alpn_protocols(["h2"])  # grpc-go insists on it, buildx offers nothing; neither is required
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= _NO_CHECK_TIME
    context.load_verify_locations(cadata=ca_pem.decode("ascii"))
    load_chain(context, cert_pem, key_pem, ca_pem)
    context.options &= (
        ~ssl.OP_CIPHER_SERVER_PREFERENCE
    )  # clients prefer AES-128, which takes less of everybody's time
    context.sslobject_class = SniSSLObject
    context.sni_callback = _remember
    return context


def _remember(client: ssl.SSLObject, server_name: str, _context: ssl.SSLContext) -> None:
    """Every name is taken, and the same certificate shown: what a name means is judged with the lease."""
    if isinstance(client, SniSSLObject):
        client.asked_for = server_name


def without_traceback(what: sys.UnraisableHookArgs) -> None:
    """A `sys.unraisablehook`: a server name that is not ASCII is a client's fault, and nothing to print about.

    Python refuses it with a TLS alert before `_remember` is asked, and then has nobody to raise the error to.
    """
    if not isinstance(what.exc_value, UnicodeDecodeError):
        sys.__unraisablehook__(what)
