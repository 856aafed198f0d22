"""First bytes of clients that never finish a TLS handshake. Fast tests and floods use the same table.

Nothing here opens a connection.
"""

from __future__ import annotations

import ssl


def client_hello(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """Returns a complete ClientHello of OpenSSL, in its record."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server cannot be complete")


FIRST_BYTES = {
    "silent": b"",
    "one byte": b"\x16",
    "half a ClientHello": client_hello()[:150],
    "the first half of 128 KB": b"\x16\3\1\x40\0\1\1\xff\xff" + client_hello()[9:150],
    "a ClientHello and no more": client_hello(),
    "no TLS: garbage": bytes(range(0x80, 0x100)) * 8,
    "no TLS: plain HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no TLS: HTTP/2 without TLS": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "no TLS: TLS 1.2": client_hello(ssl.TLSVersion.TLSv1_2),
    "no TLS: SSL 2": b"\x80\x2e\1\0\2\0\x15\0\0\0\x10" + bytes(37),
    "no TLS: an oversized record": b"\x16\3\1\xff\xff\1\0\xff\xfb\3\3" + bytes(1000),
    "no TLS: data before the handshake": b"\x17\3\3\0\x20" + bytes(32),
    "no TLS: an answer of a server": b"\x16\3\3\0\x08\2\0\0\4\3\3\0\0",
    "no TLS: garbage after a ClientHello": client_hello() + b"\x17\3\3\1\0" + bytes(256),
}
"""By name. Those named "no TLS" can be refused at once; the others wait for the handshake deadline."""
