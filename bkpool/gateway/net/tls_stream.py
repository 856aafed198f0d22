"""TLS without a socket: bytes of ciphertext go in and come out.

It also refuses a peer that keeps the gateway busy with records without data. It never reads from a socket or sends to
one, and it does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from typing import Final, cast

from bkpool.gateway.net.buffers import DECRYPT_CHUNK, MAX_RECORD, RECORD_OVERHEAD
from bkpool.gateway.net.record_counter import RecordCounter
from bkpool.ports.server_tls import ServerTlsObject

_DATA_PER_EMPTY = 16
"""Records with data that allow one without. Padding is data here, however much it is (RFC 8446 section 5.4)."""
_FEW_RECORDS, _SMALL_RECORD = 64, 128
"""More records than this in one step, of fewer bytes than this on average, are many small ones."""
_MOST_EMPTY = 64
"""Records without data that may come before their records with data."""


class EmptyRecordsError(ssl.SSLError):
    """A peer sends many records without data. A KeyUpdate costs us 20 microseconds, and the peer only 27 bytes."""

    reason = "records without data"


class SniSSLObject(ServerTlsObject):
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

    __slots__ = (
        *("_empty", "_incoming", "_object", "_read_into", "_records", "_uncounted"),
        *("outgoing", "small_records", "take"),
    )

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool = True, server_hostname: str | None = None
    ) -> None:
        self._empty = 0  # _DATA_PER_EMPTY for each record without data, less the records with data
        self._records = RecordCounter()
        self._uncounted = 0  # records that came together with the end of the handshake
        self.small_records = True
        """The peer's last bytes were many small records, or it has sent none yet: little should be read at once."""
        self._incoming = ssl.MemoryBIO()
        self.outgoing: Final = ssl.MemoryBIO()
        """The ciphertext that must be sent now."""
        self.take: Final[Callable[[], bytes]] = self.outgoing.read
        """Removes and returns what is in `outgoing`."""
        self._object = context.wrap_bio(
            self._incoming, self.outgoing, server_side=server_side, server_hostname=server_hostname
        )
        # With a buffer, read returns a count.
        self._read_into = cast("Callable[[int, memoryview], int]", self._object.read)

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
        rest = self._incoming.read()  # it begins with a record: OpenSSL has taken no more than it needed
        self._incoming.write(rest)
        self._uncounted = self._records.count(memoryview(rest))
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
        length = records = 0
        for at in range(0, len(data) or 1, DECRYPT_CHUNK):
            part = data[at : at + DECRYPT_CHUNK]
            more, with_data, ended = self._read(part, into[length:])
            length += more
            if self._records.between and len(part) == more + with_data * RECORD_OVERHEAD and not self._uncounted:
                records += with_data  # nothing is left for a record without data
                self._empty = max(0, self._empty - with_data)
            else:
                records += self._count(part, with_data)
            if ended:
                break
        self.small_records = records > _FEW_RECORDS and records * _SMALL_RECORD > len(data)
        return length, ended

    def _count(self, data: memoryview, with_data: int) -> int:
        """Returns how many records begin in this ciphertext, and refuses it if too many are without data."""
        records, self._uncounted = self._records.count(data) + self._uncounted, 0
        self._empty = max(0, self._empty + _DATA_PER_EMPTY * (records - with_data) - with_data)
        if self._empty > _DATA_PER_EMPTY * _MOST_EMPTY:
            raise EmptyRecordsError
        return records

    def _read(self, data: memoryview, into: memoryview) -> tuple[int, int, bool]:
        """Returns the length of the plaintext, the number of its records, and whether the peer has ended."""
        incoming = self._incoming
        incoming.write(data)
        read = self._read_into
        length = records = 0
        try:
            while count := read(MAX_RECORD, into[length:]):
                length += count
                records += 1  # read never returns the data of two
                if not incoming.pending:  # OpenSSL has everything; another read would cost an exception per chunk
                    return length, records, False
        except ssl.SSLWantReadError:
            return length, records, False
        except ssl.SSLZeroReturnError:  # raised instead of a count of 0 once we have sent close_notify
            pass
        return length, records, True

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
