"""Gives OpenSSL a certificate and its key, which it reads from paths only, without a file on any disk.

It keeps nothing, and never writes a key where another process could find it.
"""

from __future__ import annotations

import os
import ssl


def load_chain(context: ssl.SSLContext, cert_pem: bytes, key_pem: bytes, ca_pem: bytes = b"") -> None:
    """Has the context present this certificate.

    Args:
        context: A server's or a client's.
        cert_pem: The certificate, with its chain if it has one.
        key_pem: The certificate's key.
        ca_pem: What the context trusts, if the certificate may be of the same CA: it is presented too. Otherwise
            OpenSSL looks for the rest of the chain there and verifies it, in every handshake and for a seventh of its
            time (docs/benchmarks.md).

    Raises:
        ssl.SSLError: One of them is unreadable, or the key is not the certificate's.
    """
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(b"\n".join((key_pem, cert_pem, ca_pem)))
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
