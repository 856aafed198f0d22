"""Gives OpenSSL a certificate and its key, which it reads from paths only, without a file on any disk.

It keeps nothing, and never writes a key where another process could find it.
"""

from __future__ import annotations

import os
import ssl


def load_chain(context: ssl.SSLContext, cert_pem: bytes, key_pem: bytes) -> None:
    """Has the context present this certificate.

    Args:
        context: A server's or a client's.
        cert_pem: The certificate, with its chain if it has one.
        key_pem: The certificate's key.

    Raises:
        ssl.SSLError: One of them is unreadable, or the key is not the certificate's.
    """
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(key_pem + b"\n" + cert_pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
