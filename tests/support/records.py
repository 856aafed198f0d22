"""A client's side of TLS 1.3 from its records up, so that it can say what no library says (RFC 8446 section 5).

The handshake is OpenSSL's; afterwards this takes the connection over, with the secrets that OpenSSL has written into
a key log. For tests alone: it knows one cipher suite, and forgives nothing.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23  # content types, RFC 8446 section 5.1
CLIENT_HELLO = b"\x01\0\0\0"
KEY_UPDATE_REQUESTED = b"\x18\0\0\1\1"
KEY_UPDATE = b"\x18\0\0\1\0"
CLOSE_NOTIFY = b"\1\0"
SUITE = "TLS_AES_256_GCM_SHA384"  # what OpenSSL agrees on with itself
_TAG = 16


def expand(secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446 section 7.1, without a context."""
    name = b"tls13 " + label.encode()
    info = length.to_bytes(2) + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(SHA384(), length, info).derive(secret)


class Direction:
    """What protects the records of one direction."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._begin()

    def update(self) -> None:
        """The keys after a KeyUpdate (section 7.2)."""
        self._secret = expand(self._secret, "traffic upd", len(self._secret))
        self._begin()

    def seal(self, kind: int, data: bytes, padding: int = 0) -> bytes:
        """One record."""
        inner = data + bytes([kind]) + bytes(padding)
        header = b"\x17\3\3" + (len(inner) + _TAG).to_bytes(2)
        return header + self._aead.encrypt(self._nonce(), inner, header)

    def open(self, record: bytes) -> tuple[int, bytes]:
        """The content type and the content of one record."""
        inner = self._aead.decrypt(self._nonce(), record[5:], record[:5]).rstrip(b"\0")
        return inner[-1], inner[:-1]

    def _begin(self) -> None:
        self._aead = AESGCM(expand(self._secret, "key", 32))
        self._iv = int.from_bytes(expand(self._secret, "iv", 12))
        self._count = 0

    def _nonce(self) -> bytes:
        self._count += 1
        return (self._iv ^ (self._count - 1)).to_bytes(12)


class Records:
    """A blocking client of the gateway, shaken hands with.

    Args:
        port: Where it listens, on the loopback.
        context: The client's TLS settings, used for nothing else.
        keylog: A file that is not there yet.
    """

    def __init__(self, port: int, context: ssl.SSLContext, keylog: Path) -> None:
        context.keylog_filename = str(keylog)
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while not _shaken(tls):
            self.sock.sendall(outgoing.read())
            header = self._exactly(5)  # no record more than OpenSSL needs: what follows is for us
            incoming.write(header + self._exactly(int.from_bytes(header[3:])))
        self.sock.sendall(outgoing.read())
        cipher = tls.cipher()
        assert cipher is not None
        assert cipher[0] == SUITE
        secrets = dict(line.split()[::2] for line in keylog.read_text().splitlines() if not line.startswith("#"))
        self.out = Direction(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"]))
        self._in = Direction(bytes.fromhex(secrets["SERVER_TRAFFIC_SECRET_0"]))
        self._heard = bytearray()
        self.updates = 0
        """How many KeyUpdates came."""

    def say(self, data: bytes) -> None:
        """Application data."""
        self.sock.sendall(self.out.seal(APPLICATION_DATA, data))

    def storm(self, count: int) -> bytes:
        """So many KeyUpdates that ask for one in return, to be sent before any later record."""
        storm = bytearray()
        for _ in range(count):
            storm += self.out.seal(HANDSHAKE, KEY_UPDATE_REQUESTED)
            self.out.update()
        return bytes(storm)

    def hear(self) -> tuple[int, bytes]:
        """The next record that is no KeyUpdate; (0, b"") at the end of the connection."""
        while True:
            if not self._fill(5) or not self._fill(length := 5 + int.from_bytes(self._heard[3:5])):
                return 0, b""
            kind, data = self._in.open(bytes(self._heard[:length]))
            del self._heard[:length]
            if (kind, data[:1]) != (HANDSHAKE, KEY_UPDATE[:1]):
                return kind, data
            self.updates += 1
            self._in.update()

    def echo(self, data: bytes) -> None:
        """Says something to a worker that echoes it."""
        self.say(data)
        heard = bytearray()
        while len(heard) < len(data):
            kind, more = self.hear()
            assert kind == APPLICATION_DATA, (kind, more)
            heard += more
        assert heard == data

    def close(self) -> None:
        self.sock.close()

    def _exactly(self, length: int) -> bytes:
        return self.sock.recv(length, socket.MSG_WAITALL)

    def _fill(self, length: int) -> bool:
        while len(self._heard) < length:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return False
            self._heard += data
        return True


def _shaken(tls: ssl.SSLObject) -> bool:
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
