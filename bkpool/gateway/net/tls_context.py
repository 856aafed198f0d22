"""The gateway's TLS settings: TLS 1.3, client certificates of our CA requested, no session tickets.

Of all faults of a client's certificate, only a foreign CA fails in TLS. A missing or an expired certificate passes
here, so that `session.certificate` can answer it with a sentence.
"""

from __future__ import annotations

import ssl
import sys

from bkpool.gateway.net.tls_stream import SniSSLObject
from bkpool.pki.chain import load_chain
from bkpool.ports.server_tls import new_server_context

# X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h); Python has no name for it.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)


def server_context(cert_pem: bytes, key_pem: bytes, ca_pem: bytes) -> ssl.SSLContext:
    """Returns the context for accepted connections.

    Args:
        cert_pem: The gateway's certificate, with its chain if it has one.
        key_pem: The certificate's key.
        ca_pem: The CA of the clients' certificates.

    Raises:
        ssl.SSLError: One of them is unreadable, or the key does not belong to the certificate.
    """
    context = new_server_context(ssl.TLSVersion.TLSv1_3)
    # Tickets take a third of a handshake's time, and a resumed session would skip the client's certificate.
    context.num_tickets = 0
    context.set_alpn_protocols(["h2"])  # grpc-go requires it and buildx does not offer it, so it is optional here
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= _NO_CHECK_TIME
    context.load_verify_locations(cadata=ca_pem.decode("ascii"))
    load_chain(context, cert_pem, key_pem, ca_pem)
    # The client chooses the cipher. Clients prefer AES-128, which takes less CPU time on both sides.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.sslobject_class = SniSSLObject
    context.sni_callback = _remember_server_name
    return context


def _remember_server_name(client: ssl.SSLObject, server_name: str, _context: ssl.SSLContext) -> None:
    """Accepts every name and shows the same certificate: the name is checked together with the lease."""
    if isinstance(client, SniSSLObject):
        client.server_name = server_name


def ignore_invalid_server_names(what: sys.UnraisableHookArgs) -> None:
    """A `sys.unraisablehook` that prints no traceback for a server name that is not ASCII.

    Such a name is the client's mistake. Python refuses it with a TLS alert before `_remember_server_name` is called,
    and then reports an error that it cannot raise anywhere.
    """
    if not isinstance(what.exc_value, UnicodeDecodeError):
        sys.__unraisablehook__(what)
