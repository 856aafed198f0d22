"""First bytes of clients that never finish a TLS handshake. Fast tests and floods use the same table.

Nothing here opens a connection.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


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


GROUPS = {
    "P-256": (0x17, 65),
    "P-384": (0x18, 97),
    "P-521": (0x19, 133),
    "X25519": (0x1D, 32),
    "X448": (0x1E, 56),
    "ffdhe2048": (0x100, 256),
    "ffdhe3072": (0x101, 384),
    "ffdhe8192": (0x104, 1024),
    "X25519MLKEM768": (0x11EC, 1216),
    "X25519Kyber768Draft00": (0x6399, 1216),
    "GREASE": (0x0A0A, 1),
}
"""Groups for key exchange by name: their number (RFC 8446 section 4.2.7), and the bytes of a share."""

_POINTS = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def hello_with_groups(
    shares: Iterable[str], supported: Iterable[str] | None = None, *, version: int = 0x0304, before: bytes = b""
) -> bytes:
    """Returns the message ClientHello, without a record, with shares of these groups (RFC 8446 section 4.2.8).

    Args:
        shares: Names in GROUPS, in the order of the shares.
        supported: Names of the groups that the client says it supports; by default those of the shares. The extension
            is left out if there is none.
        version: The only version of TLS that is offered.
        before: Other extensions, encoded, that come first.
    """
    shares = list(shares)
    groups = b"".join(GROUPS[name][0].to_bytes(2) for name in (shares if supported is None else supported))
    entries = b"".join(GROUPS[name][0].to_bytes(2) + _with_length(_share(name), 2) for name in shares)
    extensions = before + _extension(43, _with_length(version.to_bytes(2), 1))
    extensions += _extension(13, _with_length(b"\4\3\5\3\6\3\x08\4\x08\5\x08\6\4\1", 2))
    extensions += _extension(10, _with_length(groups, 2)) if groups else b""
    extensions += _extension(51, _with_length(entries, 2))
    body = b"\3\3" + os.urandom(32) + _with_length(os.urandom(32), 1) + _with_length(b"\x13\1\x13\2\xc0\x2b", 2)
    body += b"\1\0" + _with_length(extensions, 2)
    return b"\1" + _with_length(body, 3)


def in_records(message: bytes, size: int = 16384) -> bytes:
    """Returns a handshake message in plaintext records of at most this many bytes each."""
    parts = (message[at : at + size] for at in range(0, len(message), size))
    return b"".join(b"\x16\3\1" + _with_length(part, 2) for part in parts)


def _share(name: str) -> bytes:
    """A share that a server accepts; of the groups with ML-KEM one that it refuses."""
    curve = _POINTS.get(name)
    if curve is not None:
        key = ec.generate_private_key(curve).public_key()
        return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return b"\x7f" + os.urandom(GROUPS[name][1] - 1)  # below the prime of a group of numbers


def _extension(number: int, data: bytes) -> bytes:
    return number.to_bytes(2) + _with_length(data, 2)


def _with_length(data: bytes, size: int) -> bytes:
    return len(data).to_bytes(size) + data


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
    "no TLS: a share of ffdhe8192": in_records(hello_with_groups(["ffdhe8192"], ["ffdhe8192", "X25519"])),
    "no TLS: a ClientHello of 10 KB": in_records(hello_with_groups(["X25519"], ["X25519"] * 5000)),
    "no TLS: garbage after a ClientHello": client_hello() + b"\x17\3\3\1\0" + bytes(256),
}
"""By name. Those named "no TLS" can be refused at once; the others wait for the handshake deadline."""
