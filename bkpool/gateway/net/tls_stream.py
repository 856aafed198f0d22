"""TLS without a socket: bytes of ciphertext go in and come out.

It also refuses a peer that keeps the gateway busy with records without data. It never reads from a socket or sends to
one, and it does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import cast

from bkpool.gateway.net.buffers import DECRYPT_CHUNK, MAX_RECORD

_MAX_EXPANSION = 24
"""Bytes of ciphertext allowed for one byte of plaintext. A record of one byte has 23 (RFC 8446 section 5.2)."""
_MAX_WITHOUT_DATA = 2 * MAX_RECORD
"""Bytes of ciphertext that may come without plaintext: the first part of a record, and a few KeyUpdates."""


class EmptyRecordsError(ssl.SSLError):
    """A peer sends many records without data. A KeyUpdate costs us 20 microseconds, and the peer only 27 bytes."""

    reason = "records without data"


class SniSSLObject(ssl.SSLObject):
    """The server side of a TLS connection, which remembers the server name that its client sent."""

    server_name: str | None = None
    """The name in the client's SNI extension (RFC 6066 section 3); None if the client sent none."""


class TlsStream:
    """TLS of one peer over two memory buffers.

    After every call, also after one that failed, send what `take` returns. Otherwise TLS alerts are lost.

    Args:
        context: The TLS settings.
        server_side: Whether this is the server's side.
        server_hostname: The name that a client sends (SNI) and checks; None sends and checks none.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "_without_data")

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool = True, server_hostname: str | None = None
    ) -> None:
        self._without_data = 0
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )

    def handshake(self, data: memoryview) -> bool:
        """Continues the handshake with these bytes of the peer.

        Returns:
            Whether the handshake is complete.

        Raises:
            ssl.SSLError: The handshake failed.
        """
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def peer_certificate(self) -> bytes | None:
        """Returns the peer's own certificate in DER; None if the peer sent none."""
        return self._object.getpeercert(binary_form=True)

    @property
    def server_name(self) -> str | None:
        """The server name that the client sent, if the context's `sslobject_class` is SniSSLObject."""
        return self._object.server_name if isinstance(self._object, SniSSLObject) else None

    def decrypt(self, data: memoryview, into: memoryview) -> tuple[int, bool]:
        """Decrypts every complete record.

        Args:
            data: Ciphertext, at most MAX_READ bytes. Empty data decrypts what was given earlier.
            into: Where the plaintext goes; as large as LoopBuffers.plaintext.

        Returns:
            The length of the plaintext, and whether the peer has sent close_notify.

        Raises:
            ssl.SSLError: The peer violated TLS.
            EmptyRecordsError: The peer sent too many records without data.
        """
        length, ended = self._read(data[:DECRYPT_CHUNK], into)
        self._check_expansion(min(len(data), DECRYPT_CHUNK), length)
        for at in range(DECRYPT_CHUNK, len(data), DECRYPT_CHUNK):
            if ended:
                break
            more, ended = self._read(data[at : at + DECRYPT_CHUNK], into[length:])
            length += more
            self._check_expansion(min(len(data) - at, DECRYPT_CHUNK), more)
        return length, ended

    def _check_expansion(self, ciphertext: int, plaintext: int) -> None:
        self._without_data = max(0, self._without_data + ciphertext - _MAX_EXPANSION * plaintext)
        if self._without_data > _MAX_WITHOUT_DATA:
            raise EmptyRecordsError

    def _read(self, data: memoryview, into: memoryview) -> tuple[int, bool]:
        incoming = self._incoming
        incoming.write(data)
        read = self._object.read
        length = 0
        try:
            while count := cast("int", read(MAX_RECORD, into[length:])):  # with a buffer, read returns a count
                length += count
                if not incoming.pending:  # OpenSSL has everything; another read would cost an exception per chunk
                    return length, False
        except ssl.SSLWantReadError:
            return length, False
        except ssl.SSLZeroReturnError:  # raised instead of a count of 0 once we have sent close_notify
            pass
        return length, True

    def encrypt(self, data: memoryview) -> None:
        """Encrypts all of the data."""
        sent = self._object.write(data)
        while sent < len(data):
            sent += self._object.write(data[sent:])

    def close_notify(self) -> None:
        """Adds close_notify to the outgoing bytes. Call it once. The peer's bytes can still be decrypted."""
        if self._incoming.pending:  # unwrap() would take these bytes for an error, and nothing more could be read
            return
        with contextlib.suppress(ssl.SSLError):  # WANT_READ: the peer has not sent its close_notify yet
            self._object.unwrap()

    def take(self) -> bytes:
        """Removes and returns the ciphertext that must be sent now."""
        return self._outgoing.read()
