"""Loads a certificate and its key into an SSLContext, which reads them from a path only, without a file on disk.

It never writes a key to a place where another process could read it.
"""

from __future__ import annotations

import os
import ssl


def load_chain(context: ssl.SSLContext, cert_pem: bytes, key_pem: bytes, ca_pem: bytes = b"") -> None:
    """Makes the context present this certificate.

    Args:
        context: Of a server or a client.
        cert_pem: The certificate, with its chain if it has one.
        key_pem: The certificate's key.
        ca_pem: The CA that the context trusts, if it may have issued this certificate: it is presented, too. Without
            it, OpenSSL builds the chain from the trusted CAs and verifies it, which takes a seventh of the time of
            every handshake (docs/benchmarks.md).

    Raises:
        ssl.SSLError: One of them is unreadable, or the key does not belong to the certificate.
    """
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(b"\n".join((key_pem, cert_pem, ca_pem)))
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
