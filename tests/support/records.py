"""A client of TLS 1.3 that makes its own records, so that it can send what no TLS library sends (RFC 8446 section 5).

OpenSSL does the handshake. Afterwards this module takes the connection over, with the secrets that OpenSSL wrote to a
key log. For tests only: it knows one cipher suite, and any error raises an exception.
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
TIMEOUT = 60.0  # seconds for one call, so that a test whose gateway is silent ends
_TAG = 16


def expand(secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446 section 7.1, without a context."""
    name = b"tls13 " + label.encode()
    info = length.to_bytes(2) + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(SHA384(), length, info).derive(secret)


class RecordProtection:
    """The keys of one direction.

    Args:
        secret: The traffic secret (section 7.1).
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._derive_keys()

    def update(self) -> None:
        """Changes to the keys after a KeyUpdate (section 7.2)."""
        self._secret = expand(self._secret, "traffic upd", len(self._secret))
        self._derive_keys()

    def encrypt(self, kind: int, data: bytes, padding: int = 0) -> bytes:
        """Returns one encrypted record."""
        inner = data + bytes([kind]) + bytes(padding)
        header = b"\x17\3\3" + (len(inner) + _TAG).to_bytes(2)
        return header + self._aead.encrypt(self._nonce(), inner, header)

    def decrypt(self, record: bytes) -> tuple[int, bytes]:
        """Returns the content type and the content of one record."""
        inner = self._aead.decrypt(self._nonce(), record[5:], record[:5]).rstrip(b"\0")
        return inner[-1], inner[:-1]

    def _derive_keys(self) -> None:
        self._aead = AESGCM(expand(self._secret, "key", 32))
        self._iv = int.from_bytes(expand(self._secret, "iv", 12))
        self._count = 0

    def _nonce(self) -> bytes:
        self._count += 1
        return (self._iv ^ (self._count - 1)).to_bytes(12)


class RecordClient:
    """A blocking client of the gateway, after its handshake.

    Args:
        port: The gateway's port on 127.0.0.1.
        context: The client's TLS settings. Nothing else may use them.
        keylog: Path of a file that does not exist yet.
        delay_last: Whether the last bytes of the handshake stay in `unsent`, for the caller to send.
    """

    def __init__(self, port: int, context: ssl.SSLContext, keylog: Path, *, delay_last: bool = False) -> None:
        context.keylog_filename = str(keylog)
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while not _handshake_complete(tls):
            self.sock.sendall(outgoing.read())
            header = self._read_exactly(5)  # reads no more than OpenSSL needs: later records are for us
            incoming.write(header + self._read_exactly(int.from_bytes(header[3:])))
        self.unsent = outgoing.read()
        if not delay_last:
            self.sock.sendall(self.unsent)
        cipher = tls.cipher()
        assert cipher is not None
        assert cipher[0] == SUITE
        secrets = dict(line.split()[::2] for line in keylog.read_text().splitlines() if not line.startswith("#"))
        self.out = RecordProtection(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"]))
        self._in = RecordProtection(bytes.fromhex(secrets["SERVER_TRAFFIC_SECRET_0"]))
        self._received = bytearray()
        self.updates = 0
        """The number of KeyUpdates received."""

    def send(self, data: bytes) -> None:
        """Sends application data."""
        self.sock.sendall(self.out.encrypt(APPLICATION_DATA, data))

    def key_updates(self, count: int) -> bytes:
        """Returns this many KeyUpdates that each request one. They must be sent before any later record."""
        updates = bytearray()
        for _ in range(count):
            updates += self.out.encrypt(HANDSHAKE, KEY_UPDATE_REQUESTED)
            self.out.update()
        return bytes(updates)

    def receive(self) -> tuple[int, bytes]:
        """Returns the next record that is not a KeyUpdate; (0, b"") at the end of the connection."""
        while True:
            if not self._receive_at_least(5):
                return 0, b""
            length = 5 + int.from_bytes(self._received[3:5])
            if not self._receive_at_least(length):
                return 0, b""
            kind, data = self._in.decrypt(bytes(self._received[:length]))
            del self._received[:length]
            if (kind, data[:1]) != (HANDSHAKE, KEY_UPDATE[:1]):
                return kind, data
            self.updates += 1
            self._in.update()

    def echo(self, data: bytes) -> None:
        """Sends this to a worker that echoes it, and expects it back."""
        self.send(data)
        received = bytearray()
        while len(received) < len(data):
            kind, more = self.receive()
            assert kind == APPLICATION_DATA, (kind, more)
            received += more
        assert received == data

    def close(self) -> None:
        self.sock.close()

    def _read_exactly(self, length: int) -> bytes:
        return self.sock.recv(length, socket.MSG_WAITALL)

    def _receive_at_least(self, length: int) -> bool:
        while len(self._received) < length:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return False
            self._received += data
        return True


def _handshake_complete(tls: ssl.SSLObject) -> bool:
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
